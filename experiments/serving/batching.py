"""Images a second at a bound on the latency: requests that share steps, against requests in batches.

Both are drawn by the same slots of the same engine, in this process and without HTTP. In batches, as servers
of models usually have them, requests begin together when all slots are free, and the next ones wait for the
last of them; each still gets its image as soon as that is done, which is more than such servers do.
"""

from __future__ import annotations

import collections
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.serving.client import percentile
from jaxldm import serving
from jaxldm.serving.engine import Table

STEPS = (4, 10, 20, 50)
LABELS, SCALE = 10, 3.0
RISE = 1.06  # from one rate that is tried to the next


class Run(NamedTuple):
    """Arrivals of one rate, drawn.

    Attributes:
        rate: requests a second that came.
        throughput: images a second until the last was done.
        p95: seconds from arrival to image.
    """

    rate: float
    throughput: float
    p95: float


def warm_engine(pipe: Any, slots: int) -> serving.Engine:
    """An engine of so many slots, compiled."""
    engine = serving.Engine(pipe, sizes=(slots,))
    engine.allow([0], guidance_scale=SCALE)
    engine.warm_up()
    return engine


def jobs_of(engine: serving.Engine, number: int, seed: int) -> list[Any]:
    """Jobs of one image each with steps of `STEPS` at random."""
    rng = np.random.default_rng(seed)
    steps = rng.choice(STEPS, number)
    return [
        engine.prepare(
            jax.random.key(n), [n % LABELS], num_inference_steps=int(steps[n]), guidance_scale=SCALE
        )
        for n in range(number)
    ]


def arrivals(number: int, rate: float, seed: int) -> np.ndarray:
    """Moments of a Poisson process."""
    return np.cumsum(np.random.default_rng(seed).exponential(1 / rate, number))


def draw(engine: serving.Engine, jobs: list[Any], rate: float, share_steps: bool, seed: int = 1) -> Run:
    """Draws jobs that come at random moments.

    Args:
        rate: jobs a second.
        share_steps: whether an image begins as soon as a slot is free; else when all are.
    """
    moments = arrivals(len(jobs), rate, seed)
    waiting: collections.deque[int] = collections.deque()
    latencies, come, start = [], 0, time.perf_counter()
    while len(latencies) < len(jobs):
        now = time.perf_counter() - start
        while come < len(jobs) and moments[come] <= now:
            waiting.append(come)
            come += 1
        if share_steps or not engine.busy:
            while waiting and engine.has_room(jobs[waiting[0]]):
                number = waiting.popleft()
                engine.begin(jobs[number], 0, number, 1 + len(waiting))
        if not engine.busy:
            time.sleep(max(moments[come] - now, 0.0))
            continue
        _, drawn, failed = engine.step()
        assert not failed
        now = time.perf_counter() - start
        latencies += [now - moments[int(one.ticket)] for one in drawn]  # type: ignore[call-overload]
    return Run(rate, len(jobs) / (time.perf_counter() - start), percentile(latencies, 0.95))


def capacity(engine: serving.Engine) -> float:
    """Images a second with all slots busy, by the measured step."""
    (kind,) = engine.kinds
    return 1 / (float(np.mean(STEPS)) * engine.seconds(kind))


def best(engine: serving.Engine, jobs: list[Any], bound: float, share_steps: bool, rate: float) -> Run:
    """The run of the highest rate whose 95th percentile is within the bound.

    Args:
        rate: the first; the next ones are larger by `RISE`, until the bound is broken.
    """
    found = Run(0.0, 0.0, 0.0)
    while True:
        run = draw(engine, jobs, rate, share_steps)
        print(
            f"  {'shared steps' if share_steps else 'batches':12s} {rate:7.2f}/s p95 {run.p95:6.2f} s",
            flush=True,
        )
        if run.p95 > bound:
            return found
        found, rate = run, rate * RISE


def compare(pipe: Any, slots: int, number: int, factors: tuple[float, float]) -> dict[str, Any]:
    """Both, at the latency of an image of 50 steps that has waited for one and a half others.

    Args:
        slots: K.
        number: of requests of each run.
        factors: first rates as shares of what full slots draw: of batches, and of shared steps.
    """
    engine = warm_engine(pipe, slots)
    jobs = jobs_of(engine, number, seed=0)
    draw(engine, jobs[: 2 * slots], 1e6, share_steps=True)  # the measured step of full slots
    full = capacity(engine)
    (kind,) = engine.kinds
    bound = 2.5 * max(STEPS) * engine.seconds(kind) * slots
    batches, shared = (
        best(engine, jobs, bound, share, full * factor)
        for share, factor in zip((False, True), factors, strict=True)
    )
    return {
        "slots": slots,
        "requests of each run": number,
        "full slots, images a second": full,
        "bound on p95, seconds": bound,
        "batches, images a second": batches.throughput,
        "batches, p95 seconds": batches.p95,
        "shared steps, images a second": shared.throughput,
        "shared steps, p95 seconds": shared.p95,
        "gain": shared.throughput / batches.throughput if batches.throughput else float("nan"),
    }


def step_seconds(pipe: Any, sizes: list[int], repeats: int) -> dict[str, Any]:
    """Seconds of a step by K, and the line a + b K through them."""
    job = serving.prepare(pipe, jax.random.key(0), [0], num_inference_steps=1000, guidance_scale=SCALE)
    device, seconds = jax.local_devices()[0], {}
    network = jax.device_put(pipe.denoiser, device)
    for size in sizes:
        table = Table(job.kind, job.rows, size, device)
        for _ in range(size):
            table.begin(job, 0, "x")
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            table.advance(network)
            table.finish_step()
            times.append(time.perf_counter() - start)
        seconds[size] = float(np.median(times[1:]))
    b, a = np.polyfit(sizes, [seconds[size] for size in sizes], 1)
    return {"a": float(a), "b": float(b), "seconds": {str(size): value for size, value in seconds.items()}}

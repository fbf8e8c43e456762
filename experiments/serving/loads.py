"""What a server does under load, floods, kills, nonsense, and for long: a function for each."""

from __future__ import annotations

import asyncio
import base64
import functools
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.serving.batching import LABELS, SCALE, STEPS, arrivals
from experiments.serving.client import Answer, ask, events, metrics, percentile
from experiments.serving.nonsense import nonsense, slow_senders
from experiments.serving.server import OPEN, Server, serving
from jaxldm import serving as server_side
from jaxldm.serving.pictures import picture_bytes

SLOTS, FEW_SLOTS = 16, 4  # few where every image is drawn again, alone in so many slots
ONLY = ("--slots", str(SLOTS))
ENDLESS = ("--max-queue", "100000", "--max-queue-seconds", "100000")


def body(seed: int, steps: int, **more: Any) -> dict[str, Any]:
    """A request of one image."""
    return {"class_labels": seed % LABELS, "seed": seed, "num_inference_steps": steps} | {
        "guidance_scale": SCALE,
        **more,
    }


async def timed_load(port: int, bodies: list[dict[str, Any]], moments: np.ndarray) -> list[Answer]:
    """Sends requests at their moments, whatever becomes of the others."""
    start = time.perf_counter()

    async def one(request: dict[str, Any], moment: float) -> Answer:
        await asyncio.sleep(max(start + moment - time.perf_counter(), 0))
        return await ask(port, "POST", "/generate", request)

    return list(await asyncio.gather(*map(one, bodies, moments)))


def drawn_alone(pipe: Any) -> Callable[[dict[str, Any], int], bytes]:
    """A function of (request, K): the bytes of its picture, drawn here by the pipeline."""
    pipes: dict[int, Any] = {}

    def draw(request: dict[str, Any], slots: int) -> bytes:
        alone = pipes.setdefault(slots, server_side.as_served(pipe, slots))
        steps, labels = request["num_inference_steps"], [request["class_labels"]]
        key = jax.random.key(request["seed"])
        return picture_bytes(alone(key, labels, num_inference_steps=steps, guidance_scale=SCALE)[0])

    return draw


def unequal(pipe: Any, answered: list[tuple[dict[str, Any], Answer]]) -> int:
    """How many requests were answered with other pictures than the pipeline draws."""
    draw, wrong = drawn_alone(pipe), 0
    for request, answer in answered:
        facts = answer.facts
        wrong += base64.b64decode(facts["images"][0]) != draw(request, facts["slots"])
    return wrong


# ---------------------------------------------------------------- one request at a time


def cold_start(folder: Path) -> dict[str, Any]:
    """Seconds from the command to the first image, when all was compiled before."""

    def seconds(*options: str) -> float:
        start = time.perf_counter()
        with serving(folder, *options, cache=Path(scratch)) as server:
            answer = asyncio.run(ask(server.port, "POST", "/generate", body(1, 10)))
            assert answer.status == 200, answer.content
            return time.perf_counter() - start

    with tempfile.TemporaryDirectory() as scratch:
        first = seconds()
        again = [seconds() for _ in range(3)]
        one = [seconds("--slots", "1") for _ in range(2)]
    return {
        "without a cache, seconds": first,
        "with a cache, seconds": float(np.median(again)),
        "with a cache and one number of slots, seconds": one[1],
    }


def overhead(folder: Path, pipe: Any, repeats: int) -> dict[str, Any]:
    """A request of one client of 50 steps, against the same image by the pipeline in this process, in turn.

    The pipeline computes as the server does (`serving.as_served`); its own sampling loop is measured, too.
    """
    alone = server_side.as_served(pipe, 1)

    def call(drawing: Any, seed: int) -> float:
        start = time.perf_counter()
        options = {"num_inference_steps": 50, "guidance_scale": SCALE, "batch_size": 1}
        picture_bytes(drawing(jax.random.key(seed), [3], **options)[0])
        return time.perf_counter() - start

    with serving(folder, *OPEN, "--slots", "1") as server:
        seconds = np.array(
            [
                (
                    asyncio.run(ask(server.port, "POST", "/generate", body(seed, 50))).seconds,
                    call(alone, seed),
                    call(pipe, seed),
                )
                for seed in range(repeats + 1)
            ]
        )
    ours, theirs, own = map(float, np.median(seconds[1:], 0))  # the first compiles
    figures = {"server, seconds": ours, "as_served, seconds": theirs, "pipe's own loop, seconds": own}
    return figures | {"overhead": ours / theirs - 1}


def cancelling(folder: Path, repeats: int) -> dict[str, Any]:
    """Steps that an image of 250 steps still takes after it was cancelled, the one under way included.

    Cancelled by DELETE and by closing the connection in turn. How many were taken before is what the last
    event says that had arrived.
    """

    async def steps(port: int) -> float:
        while (await metrics(port))["jaxldm_slots_busy"] > 0:
            await asyncio.sleep(0.002)
        return (await metrics(port))["jaxldm_steps_total"]

    async def once(port: int, seed: int) -> float:
        before, stop_after, order, done = await steps(port), 10 + seed % 23, "", 0
        stream = events(port, body(seed, 250, stream=True))
        async for name, facts in stream:
            order, done = facts.get("id", order), facts.get("step", 0)
            if name == "progress" and done >= stop_after:
                break
        if seed % 2:
            assert (await ask(port, "DELETE", f"/requests/{order}")).status == 200
        await stream.aclose()
        return await steps(port) - before - done

    with serving(folder, *OPEN, *ONLY) as server:  # steps that are long next to a question over HTTP
        alone = asyncio.run(ask(server.port, "POST", "/generate", body(0, 250))).seconds
        taken = [asyncio.run(once(server.port, seed)) for seed in range(repeats)]
    return {
        "cancelled": repeats,
        "steps after, median": float(np.median(taken)),
        "steps after, most": float(max(taken)),
        "seconds of a step": alone / 250,
    }


# ---------------------------------------------------------------- many


@functools.cache
def capacity(folder: Path, slots: int = SLOTS) -> float:
    """Images a second that a server draws with all slots busy, steps of `STEPS` in equal parts."""
    number = 8 * slots
    bodies = [body(seed, steps) for steps in reversed(STEPS) for seed in range(number // len(STEPS))]
    with serving(folder, *OPEN, *ENDLESS, "--slots", str(slots)) as server:
        asyncio.run(timed_load(server.port, bodies[:slots], np.zeros(slots)))
        start = time.perf_counter()
        answers = asyncio.run(timed_load(server.port, bodies, np.zeros(len(bodies))))
        seconds = time.perf_counter() - start
    assert all(answer.status == 200 for answer in answers)
    return len(bodies) / seconds


def open_load(folder: Path, number: int) -> dict[str, Any]:
    """Images a second and latency over HTTP at rates of Poisson arrivals."""
    rng = np.random.default_rng(0)
    bodies = [body(seed, int(rng.choice(STEPS))) for seed in range(number)]
    most = capacity(folder)
    figures: dict[str, Any] = {"full slots, images a second": most, "requests of each run": number}
    for share in (0.5, 0.7, 0.9):
        with serving(folder, *OPEN, *ONLY, *ENDLESS) as server:
            asyncio.run(timed_load(server.port, bodies[:SLOTS], np.zeros(SLOTS)))
            start = time.perf_counter()
            answers = asyncio.run(timed_load(server.port, bodies, arrivals(number, share * most, 1)))
            seconds = time.perf_counter() - start
        assert all(answer.status == 200 for answer in answers)
        latencies = [answer.seconds for answer in answers]
        figures[f"at {share:.0%}"] = {
            "images a second": number / seconds,
            "p50 seconds": percentile(latencies, 0.5),
            "p95 seconds": percentile(latencies, 0.95),
        }
    return figures


def flood(folder: Path, seconds: float) -> dict[str, Any]:
    """For so many seconds three times what the server can draw."""
    rate = 3 * capacity(folder)
    promised, number = 5.0, int(rate * seconds)
    rng, memory = np.random.default_rng(0), []
    bodies = [body(seed, int(rng.choice(STEPS))) for seed in range(number)]

    async def watch(server: Server) -> None:
        while True:
            await asyncio.sleep(seconds / 60)
            memory.append(server.memory())

    async def both(server: Server) -> list[Answer]:
        watching = asyncio.ensure_future(watch(server))
        answers = await timed_load(server.port, bodies, arrivals(number, rate, 1))
        watching.cancel()
        return answers

    options = ("--max-queue", "1000", "--max-queue-seconds", str(promised))
    with serving(folder, *OPEN, *ONLY, *options) as server:
        answers = asyncio.run(both(server))
    drawn = [answer.seconds for answer in answers if answer.status == 200]
    refused = [answer.seconds for answer in answers if answer.status == 429]
    quarter = max(len(memory) // 4, 1)
    return {
        "requests": number,
        "requests a second": rate,
        "drawn": len(drawn),
        "refused": len(refused),
        "neither": number - len(drawn) - len(refused),
        "refusals, p99 seconds": percentile(refused, 0.99),
        "refusals, p50 seconds": percentile(refused, 0.5),
        "drawn, p99 seconds": percentile(drawn, 0.99),
        "drawn, most seconds": max(drawn, default=float("nan")),
        "promised seconds": promised,
        "growth of memory": max(memory[-quarter:]) / max(memory[quarter : 2 * quarter] or memory) - 1,
    }


def kills(folder: Path, pipe: Any, number: int, workers: int) -> dict[str, Any]:
    """SIGKILLs of workers at random moments under load, of which one in five while they start.

    Every image that was on its way when a worker was killed is compared with that of the pipeline, and 100
    of the others.

    Args:
        number: of kills.
        workers: of the server.
    """
    rng, rate = random.Random(workers), 0.5 * capacity(folder, FEW_SLOTS)
    sent: list[tuple[dict[str, Any], float, Answer]] = []
    moments: list[float] = []

    async def one(port: int, seed: int) -> None:
        request, start = body(seed, rng.choice(STEPS)), time.monotonic()
        sent.append((request, start, await ask(port, "POST", "/generate", request)))

    async def kill(server: Server) -> None:
        while len(moments) < number:
            if rng.random() < 0.8:
                while (await ask(server.port, "GET", "/ready")).status != 200:
                    await asyncio.sleep(0.02)
            await asyncio.sleep(rng.uniform(0.05, 3))
            for pid in rng.sample(pids, 1) if (pids := server.workers()) else ():
                os.kill(pid, signal.SIGKILL)
                moments.append(time.monotonic())

    async def kill_and_load(server: Server) -> None:
        killing, loading, seed = asyncio.ensure_future(kill(server)), [], 0
        while not killing.done():
            loading.append(asyncio.ensure_future(one(server.port, seed)))
            seed += 1
            await asyncio.sleep(rng.expovariate(rate))
        await asyncio.gather(killing, *loading)

    options = ("--slots", str(FEW_SLOTS), "--workers", str(workers))
    with serving(folder, *OPEN, *ENDLESS, *options) as server:
        asyncio.run(kill_and_load(server))
        restarts = asyncio.run(metrics(server.port))["jaxldm_worker_restarts_total"]
    accepted = [one for one in sent if one[2].status not in (429, 503)]
    drawn = [(request, start, answer) for request, start, answer in accepted if answer.status == 200]
    met = [
        (request, answer)
        for request, start, answer in drawn
        if any(start < moment < start + answer.seconds for moment in moments)
    ]
    others = [(request, answer) for request, _, answer in drawn if (request, answer) not in met][:100]
    return {
        "workers": workers,
        "kills": len(moments),
        "restarts": restarts,
        "requests a second": rate,
        "refused while no worker was ready": len(sent) - len(accepted),
        "accepted": len(accepted),
        "on their way when a worker was killed": len(met),
        "lost": len(accepted) - len(drawn),
        "compared": len(met) + len(others),
        "unequal": unequal(pipe, [*met, *others]),
    }


def hostile(folder: Path, pipe: Any, number: int) -> dict[str, Any]:
    """Nonsense from all sides, and a client that is served before and meanwhile."""
    neighbours: list[tuple[dict[str, Any], Answer]] = []

    async def neighbour(port: int, most: int = 10**9) -> None:
        for _ in range(most):
            request = body(len(neighbours), 10)
            neighbours.append((request, await ask(port, "POST", "/generate", request, address="127.0.0.2")))
            await asyncio.sleep(0.05)

    async def all_of(server: Server) -> tuple[int, dict[str, Any], dict[str, Any]]:
        await neighbour(server.port, 30)
        before = len(neighbours)
        polite = asyncio.ensure_future(neighbour(server.port))
        try:
            slow = asyncio.ensure_future(slow_senders(server.port, min(number // 50, 200)))
            return before, await nonsense(server.port, number), await slow
        finally:
            polite.cancel()

    with serving(folder, *OPEN, *ENDLESS, "--slots", str(FEW_SLOTS)) as server:
        before_them = server.workers()
        before, figures, slow = asyncio.run(all_of(server))
        alive = server.process.poll() is None and server.workers() == before_them
        log = server.log.read_text()
    seconds = [answer.seconds for _, answer in neighbours]
    return {
        **figures,
        "slow senders": slow,
        "tracebacks": log.count("Traceback"),
        "the same processes alive": alive,
        "neighbour's requests": len(neighbours),
        "neighbour's without an image": sum(answer.status != 200 for _, answer in neighbours),
        "neighbour's unequal": unequal(pipe, [one for one in neighbours if one[1].status == 200]),
        "neighbour's p95 before, seconds": percentile(seconds[:before], 0.95),
        "neighbour's p95 meanwhile, seconds": percentile(seconds[before:], 0.95),
    }


def fairness(folder: Path, jobs: int, repeats: int) -> dict[str, Any]:
    """What a client with many jobs does to another, which sends one after the other, of the same kind."""
    other = "127.0.0.3"

    async def one(port: int) -> float:
        await asyncio.sleep(random.Random(0).uniform(0.1, 0.5))
        answer = await ask(port, "POST", "/generate", body(0, 50), address=other)
        assert answer.status == 200
        return answer.seconds

    async def both(port: int) -> tuple[list[float], list[float]]:
        alone = [await one(port) for _ in range(repeats)]
        many = [asyncio.ensure_future(ask(port, "POST", "/generate", body(seed, 50))) for seed in range(jobs)]
        while (await metrics(port))["jaxldm_queue_depth"] < jobs - 3:
            await asyncio.sleep(0.02)
        await asyncio.sleep(40 * alone[0])  # until all are checked
        beside = [await one(port) for _ in range(repeats)]
        for task in many:
            task.cancel()
        await asyncio.gather(*many, return_exceptions=True)
        return alone, beside

    with serving(folder, *OPEN, *ENDLESS, "--slots", "1") as server:
        alone, beside = asyncio.run(both(server.port))
    job = float(np.median(alone))
    return {
        "jobs of the other": jobs,
        "alone, median seconds": job,
        "beside, median seconds": float(np.median(beside)),
        "beside, most seconds": max(beside),
        "jobs of delay, median": float(np.median(beside)) / job - 1,
        "jobs of delay, most": max(beside) / job - 1,
    }


def soak(folder: Path, number: int) -> dict[str, Any]:
    """Many requests at 0.6 of what the server can draw: memory and latency at the start and at the end.

    Each tenth has the same steps and moments, with other seeds.
    """
    size, rng, rate = number // 10, np.random.default_rng(0), 0.6 * capacity(folder)
    steps, moments = rng.choice(STEPS, size), arrivals(size, rate, 0)
    memory, latencies = [], []
    with serving(folder, *OPEN, *ONLY, "--max-queue", "1000") as server:
        for part in range(10):
            bodies = [body(part * size + n, int(steps[n])) for n in range(size)]
            answers = asyncio.run(timed_load(server.port, bodies, moments))
            assert all(answer.status == 200 for answer in answers)
            latencies.append(float(np.mean([answer.seconds for answer in answers])))
            memory.append(server.memory())
    return {
        "requests": 10 * size,
        "requests a second": rate,
        "growth of memory": memory[-1] / memory[1] - 1,
        "memory after each tenth, MiB": [round(one / 2**20) for one in memory],
        "mean seconds of each tenth": latencies,
        "growth of latency": float(np.mean(latencies[-3:]) / np.mean(latencies[1:4]) - 1),
    }

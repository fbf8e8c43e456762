"""What a server does under load, floods, kills, nonsense, and for long: a function for each."""

from __future__ import annotations

import asyncio
import base64
import contextlib
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
from experiments.serving.client import Answer, ask, metrics, percentile
from experiments.serving.nonsense import nonsense
from experiments.serving.server import OPEN, Server, serving
from jaxldm import serving as server_side
from jaxldm.serving.pictures import picture_bytes

SLOTS = 16
ONLY = ("--slots", str(SLOTS))


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


def unequal(pipe: Any, requests: list[dict[str, Any]], answers: list[Answer]) -> int:
    """How many of the answers have other pictures than the pipeline draws."""
    draw, wrong = drawn_alone(pipe), 0
    for request, answer in zip(requests, answers, strict=True):
        facts = answer.facts
        wrong += base64.b64decode(facts["images"][0]) != draw(request, facts["slots"])
    return wrong


# ---------------------------------------------------------------- one request at a time


def cold_start(folder: Path) -> dict[str, Any]:
    """Seconds from the command to the first image, when all was compiled before."""
    with tempfile.TemporaryDirectory() as scratch:
        seconds = []
        for _ in range(2):  # the first fills the cache
            start = time.perf_counter()
            with serving(folder, "--slots", "1", cache=Path(scratch)) as server:
                answer = asyncio.run(ask(server.port, "POST", "/generate", body(1, 10)))
                assert answer.status == 200, answer.content
                seconds.append(time.perf_counter() - start)
    return {"without a cache, seconds": seconds[0], "with a cache, seconds": seconds[1]}


def overhead(folder: Path, pipe: Any, repeats: int) -> dict[str, Any]:
    """A request of one client of 50 steps, against the same call of the pipeline, in turn."""

    def call(seed: int) -> float:
        start = time.perf_counter()
        options = {"num_inference_steps": 50, "guidance_scale": SCALE, "batch_size": 1}
        picture_bytes(pipe(jax.random.key(seed), [3], **options)[0])
        return time.perf_counter() - start

    with serving(folder, *OPEN, "--slots", "1") as server:
        ours, theirs = [], []
        for seed in range(repeats + 1):
            answer = asyncio.run(ask(server.port, "POST", "/generate", body(seed, 50)))
            ours.append(answer.seconds)
            theirs.append(call(seed))
    ours, theirs = ours[1:], theirs[1:]
    ratio = float(np.median(ours) / np.median(theirs))
    return {"server, seconds": float(np.median(ours)), "pipe, seconds": float(np.median(theirs))} | {
        "overhead": ratio - 1
    }


def cancelling(folder: Path, repeats: int) -> dict[str, Any]:
    """Steps that an image of 250 steps still takes after it was cancelled."""

    async def once(server: Server, seed: int) -> tuple[float, float]:
        task = asyncio.ensure_future(ask(server.port, "POST", "/generate", body(seed, 250, stream=True)))
        while (await metrics(server.port))["jaxldm_slots_busy"] < 1:
            await asyncio.sleep(0.005)
        task.cancel()  # closes the connection
        start = time.perf_counter()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        while (await metrics(server.port))["jaxldm_slots_busy"] > 0:
            await asyncio.sleep(0.001)
        return time.perf_counter() - start, (await metrics(server.port))["jaxldm_steps_total"]

    with serving(folder, *OPEN, *ONLY) as server:  # steps that are long next to a question over HTTP
        alone = asyncio.run(ask(server.port, "POST", "/generate", body(0, 250))).seconds
        seconds = [asyncio.run(once(server, seed))[0] for seed in range(repeats)]
    return {"seconds until the slot is free": float(np.median(seconds)), "seconds of a step": alone / 250}


# ---------------------------------------------------------------- many


def open_load(folder: Path, rate: float, number: int) -> dict[str, Any]:
    """Images a second and latency over HTTP at a rate of Poisson arrivals."""
    rng = np.random.default_rng(0)
    bodies = [body(seed, int(rng.choice(STEPS))) for seed in range(number)]
    with serving(folder, *OPEN, *ONLY, "--max-queue", "100000", "--max-queue-seconds", "100000") as server:
        asyncio.run(timed_load(server.port, bodies[:SLOTS], np.zeros(SLOTS)))
        start = time.perf_counter()
        answers = asyncio.run(timed_load(server.port, bodies, arrivals(number, rate, 1)))
        seconds = time.perf_counter() - start
    assert all(answer.status == 200 for answer in answers)
    latencies = [answer.seconds for answer in answers]
    return {"rate": rate, "images a second": number / seconds, "p95 seconds": percentile(latencies, 0.95)}


def flood(folder: Path, capacity: float, seconds: float) -> dict[str, Any]:
    """Three times what the server can draw.

    Args:
        capacity: images a second.
        seconds: of the flood.
    """
    promised, number = 5.0, int(3 * capacity * seconds)
    rng, memory = np.random.default_rng(0), []
    bodies = [body(seed, int(rng.choice(STEPS))) for seed in range(number)]

    async def watch(server: Server) -> None:
        while True:
            await asyncio.sleep(seconds / 60)
            memory.append(server.memory())

    async def both(server: Server) -> list[Answer]:
        watching = asyncio.ensure_future(watch(server))
        answers = await timed_load(server.port, bodies, arrivals(number, 3 * capacity, 1))
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
        "drawn": len(drawn),
        "refused": len(refused),
        "neither": number - len(drawn) - len(refused),
        "refusals, p99 seconds": percentile(refused, 0.99),
        "drawn, p99 seconds": percentile(drawn, 0.99),
        "promised seconds": promised,
        "growth of memory": max(memory[-quarter:]) / max(memory[quarter : 2 * quarter] or memory) - 1,
    }


def kills(folder: Path, pipe: Any, number: int, rate: float, workers: int = 1) -> dict[str, Any]:
    """SIGKILLs of workers at random moments under load.

    Args:
        number: of kills.
        rate: requests a second.
    """
    rng = random.Random(0)
    sent: list[tuple[dict[str, Any], Answer]] = []

    async def one(port: int, seed: int) -> None:
        request = body(seed, rng.choice(STEPS))
        sent.append((request, await ask(port, "POST", "/generate", request)))

    async def kill_and_load(server: Server) -> None:
        loading, seed, killed = set(), 0, 0
        following = time.monotonic() + 2
        while killed < number or time.monotonic() < following:
            loading.add(asyncio.ensure_future(one(server.port, seed)))
            seed += 1
            await asyncio.sleep(rng.expovariate(rate))
            if killed < number and time.monotonic() >= following:
                for pid in rng.sample(pids, 1) if (pids := server.workers()) else ():
                    os.kill(pid, signal.SIGKILL)
                    killed += 1
                following = time.monotonic() + rng.uniform(0.5, 6)
        await asyncio.gather(*loading)

    with serving(folder, *OPEN, *ONLY, "--max-queue", "1000", "--workers", str(workers)) as server:
        asyncio.run(kill_and_load(server))
        restarts = asyncio.run(metrics(server.port))["jaxldm_worker_restarts_total"]
    accepted = [(request, answer) for request, answer in sent if answer.status not in (429, 503)]
    drawn = [(request, answer) for request, answer in accepted if answer.status == 200]
    return {
        "kills": number,
        "restarts": restarts,
        "refused while no worker was ready": len(sent) - len(accepted),
        "accepted": len(accepted),
        "lost": len(accepted) - len(drawn),
        "unequal": unequal(pipe, *map(list, zip(*drawn, strict=True))) if drawn else 0,
    }


def hostile(folder: Path, pipe: Any, number: int) -> dict[str, Any]:
    """Nonsense from all sides, and a client that is served meanwhile."""
    neighbours: list[tuple[dict[str, Any], Answer]] = []

    async def neighbour(port: int) -> None:
        for seed in range(10**9):
            request = body(seed, 10)
            neighbours.append((request, await ask(port, "POST", "/generate", request, address="127.0.0.2")))
            await asyncio.sleep(0.05)

    async def all_of(server: Server) -> tuple[dict[int, int], float]:
        polite = asyncio.ensure_future(neighbour(server.port))
        try:
            return await nonsense(server.port, number)
        finally:
            polite.cancel()

    with serving(folder, *OPEN, *ONLY, "--max-queue", "1000") as server:
        statuses, longest = asyncio.run(all_of(server))
        alive = server.process.poll() is None and len(server.workers()) == 1
        log = server.log.read_text()
    done = [(request, answer) for request, answer in neighbours if answer.status]
    assert done and all(answer.status == 200 for _, answer in done)
    return {
        "requests": number,
        "by status": {str(status): count for status, count in sorted(statuses.items())},
        "5xx": sum(count for status, count in statuses.items() if status >= 500),
        "tracebacks": log.count("Traceback"),
        "the same processes alive": alive,
        "longest seconds": longest,
        "neighbour's requests": len(done),
        "neighbour's unequal": unequal(pipe, *map(list, zip(*done, strict=True))),
    }


def fairness(folder: Path, jobs: int) -> dict[str, Any]:
    """What a client with many jobs does to another with one."""

    async def both(port: int) -> tuple[float, float]:
        alone = (await ask(port, "POST", "/generate", body(0, 20), address="127.0.0.3")).seconds
        many = [asyncio.ensure_future(ask(port, "POST", "/generate", body(seed, 20))) for seed in range(jobs)]
        while (await metrics(port))["jaxldm_queue_depth"] < jobs * 0.8:
            await asyncio.sleep(0.02)
        beside = (await ask(port, "POST", "/generate", body(0, 20), address="127.0.0.3")).seconds
        for task in many:
            task.cancel()
        await asyncio.gather(*many, return_exceptions=True)
        return alone, beside

    options = ("--max-queue", "100000", "--max-queue-seconds", "100000")
    with serving(folder, *OPEN, "--slots", "1", *options) as server:
        alone, beside = asyncio.run(both(server.port))
    return {"alone, seconds": alone, "beside, seconds": beside, "jobs of delay": (beside - alone) / alone}


def soak(folder: Path, number: int, rate: float) -> dict[str, Any]:
    """Many requests at a rate that the server can draw: memory and latency at the start and at the end."""
    rng = np.random.default_rng(0)
    bodies = [body(seed, int(rng.choice(STEPS))) for seed in range(number)]
    parts = np.array_split(np.arange(number), 10)
    memory, latencies = [], []
    with serving(folder, *OPEN, *ONLY, "--max-queue", "1000") as server:
        for part in parts:
            moments = arrivals(len(part), rate, int(part[0]))
            answers = asyncio.run(timed_load(server.port, [bodies[n] for n in part], moments))
            assert all(answer.status == 200 for answer in answers)
            latencies.append(percentile([answer.seconds for answer in answers], 0.5))
            memory.append(server.memory())
    return {
        "requests": number,
        "growth of memory": memory[-1] / memory[1] - 1,
        "memory, MiB": [round(one / 2**20) for one in memory],
        "median seconds of each tenth": latencies,
        "growth of latency": float(np.mean(latencies[-3:]) / np.mean(latencies[1:4]) - 1),
    }

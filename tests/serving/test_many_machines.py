"""Replicas by Ray Serve, on two nodes of a cluster on this machine: `pip install 'jaxldm[ray]'`."""

import concurrent.futures
import contextlib
import functools
import json
import os
import signal
import socket
import urllib.error
import urllib.request
from pathlib import Path

import jax
import numpy as np
import pytest
import worker_makers
from served import pixels, wait_until

from experiments.serving import ray_app
from jaxldm import serving
from jaxldm.data.images import to_uint8
from jaxldm.errors import InvalidArgumentError, MissingDependencyError
from jaxldm.serving import ray_serve
from jaxldm.serving.server import Settings

OPEN = serving.Limits(burst=1000, requests_per_second=1000, max_queue=1000)
SETTINGS = Settings(name="tiny", slots=(worker_makers.K,), limits=OPEN)


def test_what_cannot_be_is_refused_in_words(monkeypatch):
    with pytest.raises(InvalidArgumentError, match="max_replicas must be at least min_replicas=3, got 2"):
        ray_serve.Scale(min_replicas=3, max_replicas=2)
    with pytest.raises(InvalidArgumentError, match="cpus must be"):
        ray_serve.Scale(cpus=-1)
    for arguments, message in (({}, "name the model"), ({"folder": "x", "slot": "1"}, "no argument 'slot'")):
        with pytest.raises(InvalidArgumentError, match=message):
            ray_app.build(arguments)
    with pytest.raises(InvalidArgumentError, match="max_replicas must be"):
        ray_app.build({"folder": "x", "slots": "1 4", "max_replicas": "0"})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'jaxldm\[ray\]'"):
        ray_serve.application_of(worker_makers.tiny, SETTINGS)


@pytest.fixture
def address(tmp_path, monkeypatch):
    """Of a door, before replicas of at most two nodes with room for one each."""
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'jaxldm[ray]'")
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    from ray import serve

    here = Path(__file__).resolve().parent  # the processes of the cluster read what pytest reads
    folders = (here, *here.parents[:2], here.parent / "models", here.parent / "pipelines")
    folders += (os.environ.get("PYTHONPATH", ""),)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(str(folder) for folder in folders if folder))
    monkeypatch.setenv("RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S", "0.5")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    node = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args=node | {"include_dashboard": False})
    cluster.add_node(**node)
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        serve.start(proxy_location="HeadOnly", http_options={"port": port})
        make = functools.partial(worker_makers.tiny_and_noted, tmp_path)
        scale = ray_serve.Scale(max_replicas=2, upscale_seconds=0)
        serve.run(ray_serve.application_of(make, SETTINGS, scale))
        yield f"http://127.0.0.1:{port}"
        serve.shutdown()
    finally:
        ray.shutdown()
        cluster.shutdown()


def slots_of(address):
    with contextlib.suppress(urllib.error.HTTPError), urllib.request.urlopen(f"{address}/metrics") as answer:
        lines = answer.read().decode().splitlines()
        return int(float(next(line.split()[1] for line in lines if line.startswith("jaxldm_slots "))))
    return 0


def ask(address, seed):
    body = {"class_labels": [seed % 3, 1], "seed": seed, "num_inference_steps": 10}
    content = json.dumps(body | {"guidance_scale": worker_makers.SCALE}).encode()
    request = urllib.request.Request(f"{address}/generate", content, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return seed, [pixels(text) for text in json.load(answer)["images"]]


@pytest.mark.filterwarnings("ignore")  # of ray
def test_replicas_come_with_the_queue_and_one_that_is_killed_loses_nothing(address, tmp_path):
    assert slots_of(address) == worker_makers.K
    with concurrent.futures.ThreadPoolExecutor(40) as pool:
        answers = [pool.submit(ask, address, seed) for seed in range(200)]
        # A node has room for one: the second replica is on the other.
        wait_until(lambda: slots_of(address) == 2 * worker_makers.K, 60)
        assert not all(answer.done() for answer in answers)
        os.kill(int(next(tmp_path.iterdir()).name), signal.SIGKILL)
        drawn = dict(answer.result(120) for answer in answers)
    wait_until(lambda: slots_of(address) == 2 * worker_makers.K, 60)  # there is another in its place
    assert len(list(tmp_path.iterdir())) == 3
    alone = serving.as_served(worker_makers.tiny().engine.pipe, worker_makers.K)
    for seed, images in drawn.items():
        expected = alone(
            jax.random.key(seed),
            [seed % 3, 1],
            num_inference_steps=10,
            guidance_scale=worker_makers.SCALE,
        )
        np.testing.assert_array_equal(np.stack(images), to_uint8(expected).squeeze(-1))

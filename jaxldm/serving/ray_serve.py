"""A server on many machines: replicas of the engine by Ray Serve, and one door in front of them.

The door is the application of `jaxldm serve` with `Replicas` for its worker, and needs no accelerator. Ray
Serve starts and ends replicas by how many images are open at them, and starts lost ones again. Ray is
imported where a deployment is made.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import importlib.util
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, cast

from jaxldm.arguments import check_fields, count, number
from jaxldm.errors import InvalidArgumentError, MissingDependencyError
from jaxldm.serving.logs import log_lines
from jaxldm.serving.messages import Loaded
from jaxldm.serving.orders import Failed, Picture, Progress, Task
from jaxldm.serving.replicas import Calls, Replica, ReplicaBeat, ReplicaBroken, Replicas
from jaxldm.serving.server import serve_by
from jaxldm.serving.service import Service
from jaxldm.serving.settings import Settings, made
from jaxldm.serving.worker import Made

DOOR, REPLICA = "Door", "Replica"  # names of the deployments
ANSWER_SECONDS = 5.0  # for a replica to say how it is
LOOK_BACK_SECONDS = 15.0  # over which open images are averaged
LOOK_SECONDS = 0.1  # between two looks for the first replica
MANY = 100_000  # requests at once: the door bounds them


@dataclasses.dataclass(frozen=True)
class Scale:
    """How many replicas there are, and what each gets.

    Attributes:
        min_replicas, max_replicas: between which Ray Serve chooses.
        images_per_replica: open at a replica, on average: beyond it others are started. 0: as many as it has
            slots, so that others are started while images wait.
        cpus, gpus: that Ray lends a replica.
        upscale_seconds, downscale_seconds: for which there must be too much or too little to do.
    """

    min_replicas: int = 1
    max_replicas: int = 4
    images_per_replica: int = 0
    cpus: float = 1.0
    gpus: float = 0.0
    upscale_seconds: float = 10.0
    downscale_seconds: float = 300.0

    def __post_init__(self):
        check_fields(
            self,
            min_replicas=count(1),
            max_replicas=count(1),
            images_per_replica=count(0),
            cpus=number(0),
            gpus=number(0),
            upscale_seconds=number(0),
            downscale_seconds=number(0),
        )
        if self.max_replicas < self.min_replicas:
            raise InvalidArgumentError(
                f"max_replicas must be at least min_replicas={self.min_replicas}, got {self.max_replicas}"
            )


def folder_worker(
    folder: str,
    settings: Settings,
    family: str | None = None,
    dtype: str | None = None,
    devices: int | None = None,
) -> Made:
    """What a worker of a folder's model works with: for `application_of`, as a `functools.partial`.

    Args:
        folder: at the same place on every machine.
        settings: what it draws.
        family, dtype: as of `jaxldm serve`.
        devices: how many it uses; default all that Ray lends it.
    """
    import jax

    from jaxldm import pipelines

    log_lines()
    return made(pipelines.load(folder, family=family, dtype=dtype), settings, jax.local_devices()[:devices])


def application_of(
    make: Callable[[], Made],
    settings: Settings,
    scale: Scale | None = None,
    token: str | None = None,
) -> Any:
    """The application of Ray Serve that serves a model: for `serve.run`, or `serve run` with a file of yours.

    Args:
        make: loads the model, in a worker of each replica; a `functools.partial` of a function that can be
            imported there.
        settings: what is drawn, and how much is let in.
        scale: how many replicas there are.
        token: that requests must carry; None: anybody may ask.

    Raises:
        MissingDependencyError: without Ray.
    """
    if importlib.util.find_spec("ray") is None:
        raise MissingDependencyError("ray", "ray", "serving on many machines")
    from ray import serve  # pyright: ignore[reportMissingImports]

    scale = scale or Scale()
    patience = settings.limits.max_queue_seconds  # what was promised is finished first
    replica = serve.deployment(Replica).options(
        name=REPLICA,
        max_ongoing_requests=MANY,
        ray_actor_options={"num_cpus": scale.cpus, "num_gpus": scale.gpus},
        autoscaling_config={
            "min_replicas": scale.min_replicas,
            "max_replicas": scale.max_replicas,
            "target_ongoing_requests": scale.images_per_replica or sum(set(settings.slots)),
            "look_back_period_s": LOOK_BACK_SECONDS,
            "upscale_delay_s": scale.upscale_seconds,
            "downscale_delay_s": scale.downscale_seconds,
        },
        graceful_shutdown_timeout_s=patience,
        logging_config={"enable_access_log": False},  # the door logs requests
    )

    def build() -> Any:  # in the process of the door
        log_lines()
        name = serve.get_replica_context().app_name
        replicas = Replicas(calls_of(serve.get_deployment_handle(REPLICA, app_name=name)))
        return serve_by(Service([replicas], settings.limits), settings, token)

    door = serve.deployment(serve.ingress(build)()).options(
        name=DOOR,
        max_ongoing_requests=MANY,
        num_replicas=1,  # whose turn it is, and who has asked too often, is known at one place
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=patience,
        logging_config={"enable_access_log": False},  # the door logs requests
    )
    return door.bind(replica.bind(make))


def calls_of(handle: Any) -> Calls:
    """Calls by a handle of Ray Serve."""

    async def asked(method: str) -> list[Any]:
        """The answers of all replicas that run, and errors of those that have none."""
        answers = handle.broadcast(method)
        return await answers.results_async(timeout_s=ANSWER_SECONDS, return_exceptions=True)

    async def loaded() -> Loaded:
        # Not a call to any of them: one that waits makes Ray Serve start more replicas than were asked for.
        from ray.serve.exceptions import DeploymentUnavailableError  # pyright: ignore[reportMissingImports]

        while True:
            with contextlib.suppress(DeploymentUnavailableError, TimeoutError):
                found = next((one for one in await asked("loaded") if isinstance(one, Loaded)), None)
                if found is not None:
                    return found
            await asyncio.sleep(LOOK_SECONDS)

    async def check(task: Task) -> int | Failed:
        return await _ended(handle.check.remote(task))

    async def draw(task: Task, image: int) -> AsyncIterator[Progress | Picture | Failed]:
        events = handle.options(stream=True).draw.remote(task, image)
        try:
            async for event in events:
                yield event
        finally:
            events.cancel()  # without effect on one that has ended

    async def beats() -> Sequence[ReplicaBeat]:
        from ray.serve.exceptions import DeploymentUnavailableError  # pyright: ignore[reportMissingImports]

        try:
            return [one for one in await asked("beat") if isinstance(one, ReplicaBeat)]
        except DeploymentUnavailableError:
            return []  # none runs

    return Calls(loaded, check, draw, beats, is_lost)


async def _ended(response: Any) -> Any:
    """The result of a call, which ends where nobody waits for it any more."""
    try:
        return await response
    finally:
        response.cancel()


def is_lost(error: Exception) -> bool:
    """Whether an error of a call says that its replica is gone."""
    from ray.exceptions import RayError, RayTaskError  # pyright: ignore[reportMissingImports]

    return isinstance(error, RayError) and (
        not isinstance(error, RayTaskError) or isinstance(cast(Any, error).cause, ReplicaBroken)
    )

"""`jaxldm serve`: a model behind HTTP."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from tyro.conf import Positional

from jaxldm.commands import IMPORTED
from jaxldm.commands.options import first_devices, shown
from jaxldm.errors import InvalidArgumentError, MissingDependencyError
from jaxldm.reading import shown as shown_value
from jaxldm.serving.logs import log_lines

TOKEN = "JAXLDM_SERVER_TOKEN"  # an environment variable
MAX_WORKERS = 64


@dataclass(frozen=True)
class Serve:
    """Serve a model over HTTP: many requests share the steps of the network.

    For example:
      jaxldm serve runs/mini-ldm
      jaxldm serve stable-diffusion-v1-5 --dtype bfloat16 --slots 4 --solvers dpmpp_2m --sizes 512x512
      curl -s localhost:8000/generate -H 'Content-Type: application/json' -d '{"class_labels": [3, 7]}'

    An image is the same to the last bit whatever else is drawn at the time. GET / is a page to draw with; GET
    /ready answers 200 when all is compiled; GET /openapi.json describes the rest. Where the environment
    variable JAXLDM_SERVER_TOKEN is set, requests need the header "Authorization: Bearer TOKEN".
    """

    folder: Annotated[Positional[str], shown("RUN")]
    """Run folder made by `jaxldm train`, folder made by `jaxldm export`, or a folder in the layout of
    diffusers.
    """

    host: Annotated[str, shown("ADDRESS")] = "127.0.0.1"
    """Address to listen at; 0.0.0.0 is every address of this machine, and needs a token."""

    port: Annotated[int, shown("INT")] = 8000
    """Port to listen at; 0 is any that is free."""

    slots: Annotated[tuple[int, ...], shown("INT ...")] = (1, 4, 16)
    """Numbers of images that are computed at once; each is compiled, and the smallest that holds all that
    wait is used. An image stays in the one in which it began.
    """

    solvers: Annotated[tuple[str, ...] | None, shown("NAME ...", "that of the model")] = None
    """Solvers that requests may name, the default first; each is compiled. Without it all is drawn with the
    model's own, and requests name none.
    """

    sizes: Annotated[tuple[str, ...] | None, shown("HEIGHTxWIDTH ...", "that of the model")] = None
    """Sizes in pixels that requests may name, the default first; each is compiled."""

    max_steps: Annotated[int, shown("INT")] = 250
    """The most steps of one image."""

    max_images: Annotated[int, shown("INT")] = 10
    """The most images of one request."""

    max_queue: Annotated[int, shown("INT")] = 64
    """Requests that may wait; beyond them the answer is 429 with Retry-After."""

    max_queue_seconds: Annotated[float, shown("FLOAT")] = 120.0
    """The longest estimated time of a request, from acceptance to its last step; likewise."""

    requests_per_second: Annotated[float, shown("FLOAT")] = 10.0
    """Of one client, on average."""

    burst: Annotated[int, shown("INT")] = 5
    """Requests of one client at once."""

    embeddings_mib: Annotated[int, shown("INT")] = 256
    """Memory for what prompts were encoded to."""

    family: Annotated[str | None, shown("MODULE:FAMILY", "the one that the folder names")] = None
    """A family of models of your own: package.module:FAMILY."""

    dtype: Annotated[str | None, shown("DTYPE", "that of the files")] = None
    """Of weights and computations: float32, bfloat16 or float16."""

    reference_quirks: bool = False
    """Draw what diffusers draws with the folder, also where its schedulers err: to compare pictures. With
    most solvers all requests then take the model's own number of steps.
    """

    devices: Annotated[int | None, shown("INT", "one")] = None
    """Number of devices to use; each has slots of its own."""

    workers: Annotated[int, shown("INT")] = 1
    """Processes that compute, each with the model in memory of its own; one that dies is started again. On
    GPUs each has devices of its own.
    """

    cache_dir: Annotated[str | None, shown("FOLDER", "one of the user's")] = None
    """Where compiled functions are kept for the next start."""

    log_prompts: bool = False
    """Log what was asked for, prompts or classes."""

    quiet: bool = False
    """Print only errors and warnings, and log no requests."""

    computes: ClassVar[bool] = False  # its workers do, in processes of their own

    def run(self) -> None:
        """Checks the options, loads the model, and serves it until it is interrupted."""
        check_packages()
        if not 1 <= self.workers <= MAX_WORKERS:
            raise InvalidArgumentError(f"workers must be from 1 to {MAX_WORKERS}, got {self.workers}")
        sizes = tuple(read_size(size) for size in self.sizes or ())
        token = os.environ.get(TOKEN) or None
        if self.host not in ("127.0.0.1", "::1", "localhost") and token is None:
            raise InvalidArgumentError(
                f"--host {self.host} is open to others: set {TOKEN} to a secret that requests must carry, or "
                "listen at 127.0.0.1"
            )
        if self.cache_dir is not None:
            from jaxldm.host import COMPILATION_CACHE

            os.environ[COMPILATION_CACHE] = str(Path(self.cache_dir).expanduser().absolute())
        with listening(self.host, self.port) as bound:
            workers = self._workers(
                sizes
            )  # before JAX is imported here, which takes as long as in the worker
            try:
                from jaxldm import host

                host.keep_freed_memory()
                self._serve(workers, self._settings(sizes), token, bound)
            finally:
                for worker in workers:
                    worker.join(0)  # without effect where it has ended

    def _serve(self, workers: list[Any], settings: Any, token: str | None, bound: socket.socket) -> None:
        from jaxldm.serving.front import run_until_interrupted, server_of
        from jaxldm.serving.server import serve_by
        from jaxldm.serving.service import Service

        log_lines(self.quiet)
        service = Service(workers, settings.limits)
        server = server_of(serve_by(service, settings, token, only_local=token is None), service)
        bound.listen()  # who reads the next line may ask
        if not self.quiet:
            address, port = bound.getsockname()[:2]
            address = f"[{address}]" if ":" in address else address  # of IPv6
            print(
                f"{self.folder}: http://{address}:{port}/ is a page to draw with, and the API; "
                "the model is being compiled, GET /ready answers 200 when that is done",
                flush=True,
            )
        ended = threading.Event()
        if not self.quiet:
            threading.Thread(target=tell_when_ready, args=(self.folder, service, ended), daemon=True).start()
        try:
            run_until_interrupted(server, bound)
        finally:
            ended.set()
            service.close(0)  # without effect where it was closed

    def _workers(self, sizes: tuple[tuple[int, int], ...]) -> list[Any]:
        """The workers; the process of the first starts here, while this one imports the rest."""
        loading = {"family": self.family, "dtype": self.dtype, "reference_quirks": self.reference_quirks}
        options, modules = self._options(sizes), IMPORTED.get()
        make = functools.partial(
            make_worker, self.folder, loading, self.devices, options, modules, self.quiet
        )
        devices = (self.devices or 1) if self.workers > 1 else None
        return [worker_of(make, number, devices) for number in range(self.workers)]

    def _options(self, sizes: tuple[tuple[int, int], ...]) -> dict[str, Any]:
        """Those of the settings that workers need."""
        return {
            "name": Path(os.path.abspath(self.folder)).name,  # of a link, not of what it leads to
            "slots": self.slots,
            "solvers": self.solvers or (),
            "sizes": sizes,
            "max_steps": self.max_steps,
            "max_images": self.max_images,
            "embeddings_bytes": self.embeddings_mib * 2**20,
        }

    def _settings(self, sizes: tuple[tuple[int, int], ...]) -> Any:
        from jaxldm import serving
        from jaxldm.serving.settings import Settings

        return Settings(
            **self._options(sizes),
            log_prompts=self.log_prompts,
            limits=serving.Limits(
                max_queue=self.max_queue,
                max_queue_seconds=self.max_queue_seconds,
                requests_per_second=self.requests_per_second,
                burst=self.burst,
            ),
        )


def tell_when_ready(folder: str, service: Any, ended: threading.Event) -> None:
    """Prints a line as soon as a service is ready, unless it ends before."""
    start = time.monotonic()
    while not service.ready:
        if ended.wait(0.2):
            return
    print(f"{folder}: ready after {time.monotonic() - start:.0f} s", flush=True)


def worker_of(make: Callable[[], Any], number: int, devices: int | None) -> Any:
    """A worker in a process of its own."""
    from jaxldm.serving.processes import WorkerProcess

    worker = WorkerProcess(make, number, devices)
    if number == 0:
        worker.prestart()
    return worker


def make_worker(
    folder: str,
    loading: dict[str, Any],
    devices: int | None,
    options: dict[str, Any],
    modules: Sequence[str] = (),
    quiet: bool = False,
) -> Any:
    """What a worker works with, made in its process.

    Args:
        folder, devices, quiet: as of the command.
        loading: options of `pipelines.load`.
        options: of the `Settings`.
        modules: of the user's, to be imported first.
    """
    from jaxldm import pipelines
    from jaxldm.serving.settings import Settings, made

    settings = Settings(**options)
    log_lines(quiet)
    for module in modules:
        importlib.import_module(module)
    pipe = pipelines.load(folder, **loading)
    return made(pipe, settings, first_devices(devices))


def check_packages() -> None:
    """Raises `MissingDependencyError` where a package of the extra is not installed."""
    for package in ("starlette", "uvicorn", "prometheus_client"):
        if importlib.util.find_spec(package) is None:
            raise MissingDependencyError(package, "serve", "jaxldm serve")


def read_size(size: str) -> tuple[int, int]:
    """(height, width) of HEIGHTxWIDTH."""
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", size)
    if match is None:
        raise InvalidArgumentError(f"--sizes takes HEIGHTxWIDTH, as in 512x768, got {shown_value(size)}")
    return int(match[1]), int(match[2])


def listening(host: str, port: int) -> socket.socket:
    """A socket bound to an address.

    Raises:
        InvalidArgumentError: a port in use or out of range, or an address that is not of this machine.
    """
    if not 0 <= port < 2**16:
        raise InvalidArgumentError(f"--port must be from 0 to 65535, got {port}")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with contextlib.ExitStack() as stack:
            bound = stack.enter_context(socket.socket(family, kind))
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
            stack.pop_all()  # what is bound is the caller's to close
    except OSError as error:
        reason = error.strerror or error
        raise InvalidArgumentError(
            f"cannot listen at {host}:{port}: {reason}; choose another --port or --host"
        ) from None
    return bound

"""The HTTP application: reads requests, hands orders to the service, and answers. Nothing here computes."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import hmac
import json
import logging
import math
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from jaxldm.errors import shown
from jaxldm.serving.admission import client_of
from jaxldm.serving.figures import Figures
from jaxldm.serving.hints import param_in
from jaxldm.serving.mailbox import Mailbox
from jaxldm.serving.openapi import document
from jaxldm.serving.orders import Failed, Order, Picture
from jaxldm.serving.page import page_routes
from jaxldm.serving.requests import (
    OPENAI_NAMES,
    BadRequest,
    Generation,
    Offer,
    call_of,
    read_generation,
    read_json,
    read_openai,
)
from jaxldm.serving.service import Service
from jaxldm.serving.settings import HttpLimits
from jaxldm.serving.streams import EventStream, OpenAIEvents, OurEvents, stream

LOG = logging.getLogger("jaxldm.serving")
MAX_DROPPED = 2**24  # bytes of a body that is too large: who is still sending does not read the answer
# Bytes of a body that is read in a thread, as pictures are, and how many threads do: others are not to wait.
LARGE, READING = 2**16, 2
LOCAL = re.compile(r"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d+)?")  # in the header Host
ELSEWHERE = {  # of OpenAI's client
    "/images/generations": "end the client's base_url with /v1",
    "/v1/images/edits": "send image, and strength, to /v1/images/generations (extra_body)",
}
# Others are 429.
STATUS_OF_REFUSAL = {"not_ready": 503, "shutting_down": 503, "server_error": 503, "fatal_request": 500}
STATUS_OF_FAILURE = {"invalid_request": 400, "cancelled": 409, "deadline_exceeded": 504}
STATUS_OF_FAILURE |= {"server_error": 500, "fatal_request": 500}


def application(
    offer: Offer,
    service: Service,
    *,
    figures: Figures | None = None,
    token: str | None = None,
    limits: HttpLimits | None = None,
    log_prompts: bool = False,
    only_local: bool = False,
) -> Starlette:
    """The ASGI application of a server.

    Args:
        offer: what it draws.
        service: started and closed with the application.
        figures: of `/metrics`.
        token: that requests must carry as "Authorization: Bearer TOKEN"; None: anybody may ask.
        limits: of bodies and streams.
        log_prompts: whether the log says what was asked for.
        only_local: whether only localhost is answered to, so that no page of another site, whose name leads
            here, can ask.
    """
    figures, limits = figures or Figures(service), limits or HttpLimits()
    server = _Server(offer, service, figures, token, limits, log_prompts, only_local)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.start()
        yield
        await run_in_threadpool(service.close, service.admission.limits.max_queue_seconds)

    images, requests = ["POST"], ["DELETE"]
    table: list[tuple[str, Callable[[Request], Any], list[str]]] = [
        ("/generate", server.generate, images),
        ("/v1/images/generations", server.openai, images),
        ("/requests/{id}", server.cancel, requests),
        ("/models", server.models, ["GET"]),
        ("/v1/models", server.openai_models, ["GET"]),
        ("/openapi.json", server.openapi, ["GET"]),
        ("/metrics", server.metrics, ["GET"]),
    ]
    routes = [Route(path, server.counted(path, answer), methods=methods) for path, answer, methods in table]
    # Of whoever watches over the process, and the page: without a token.
    routes += [Route("/health", server.health), Route("/ready", server.ready), *page_routes()]
    handlers: Any = {HTTPException: _http_error}
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)
    app.router.redirect_slashes = False  # to wherever the header Host says
    return app


def _error(error: BadRequest) -> JSONResponse:
    headers = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body(), error.status, headers)


def _http_error(request: Request, error: Exception) -> JSONResponse:
    """Paths and methods that do not exist."""
    status, path = getattr(error, "status_code", 500), shown(request.scope["path"])
    headers = dict(getattr(error, "headers", None) or {})
    allowed = headers.get("Allow", "another method").split(", ")
    methods = " or ".join(sorted({*allowed} - {"HEAD"}))
    message = {
        404: f"there is no path {path}: {ELSEWHERE.get(request.url.path, 'see /openapi.json')}",
        405: f"{path} takes {methods}, got {request.method}: see /openapi.json",
    }
    answer = _error(BadRequest(message.get(status, "the request cannot be answered"), status=status))
    answer.headers.update(headers)
    return answer


class _Server:
    """The routes."""

    def __init__(
        self,
        offer: Offer,
        service: Service,
        figures: Figures,
        token: str | None,
        limits: HttpLimits,
        log_prompts: bool,
        only_local: bool,
    ):
        self.offer, self.service, self.figures, self.limits = offer, service, figures, limits
        self._token, self._log_prompts, self._only_local = token, log_prompts, only_local
        self._reading = asyncio.Semaphore(READING)

    def counted(self, path: str, route: Callable[[Request], Any]) -> Callable[[Request], Any]:
        """The route with its errors as JSON, counted and logged, for those who have the token."""

        async def answer(request: Request) -> Response:
            start = time.perf_counter()
            request.state.log, request.state.names = {"path": path}, {}
            try:
                self._check_host(request)
                self._check_token(request)
                response = await route(request)
            except BadRequest as error:
                response = _error(error)
                request.state.log["ended"] = error.type
            except ClientDisconnect:
                response = Response(status_code=499)
                request.state.log["ended"] = "cancelled"
            self.figures.requests.labels(path, str(response.status_code)).inc()
            log = functools.partial(self._log, request, response, start)
            if isinstance(response, EventStream):
                response.then(log)
            else:
                log()
            return response

        return answer

    def _log(self, request: Request, response: Response, start: float) -> None:
        """A line about a request that is done."""
        seconds = round(time.perf_counter() - start, 4)
        LOG.info(json.dumps(request.state.log | {"status": response.status_code, "seconds": seconds}))

    def _check_host(self, request: Request) -> None:
        name = request.headers.get("host", "")
        if self._only_local and not LOCAL.fullmatch(name):
            message = f"this server answers to localhost alone, not to {shown(name)}: start it with a token"
            raise BadRequest(message, status=421, param="Host", allowed=["localhost", "127.0.0.1"])

    def _check_token(self, request: Request) -> None:
        if self._token is None:
            return
        given = request.headers.get("authorization", "").encode()
        if not hmac.compare_digest(given, f"Bearer {self._token}".encode()):
            message = 'this server wants its token: send the header "Authorization: Bearer TOKEN"'
            raise BadRequest(message, status=401, type="authentication_error", param="Authorization")

    # ---------------------------------------------------------------- requests of images

    async def generate(self, request: Request) -> Response:
        """POST /generate."""
        start = time.perf_counter()
        generation = await self._read(await self._body(request))
        order, mailbox = await self._accepted(request, generation)
        if generation.stream:
            return self._stream(request, OurEvents(), order, mailbox, generation, start)
        pictures = await self._pictures(request, order, mailbox)
        facts = self._facts(order, generation, start) | {"slots": pictures[0].slots}
        return await run_in_threadpool(_images_response, facts, "images", pictures)

    async def openai(self, request: Request) -> Response:
        """POST /v1/images/generations."""
        start = time.perf_counter()
        own = read_openai(self.offer, body := await self._body(request))
        # What clients call by another name, errors do, too.
        request.state.names = OPENAI_NAMES | ({"class_labels": "prompt"} if "prompt" in body else {})
        try:
            generation = await self._read(own)
            order, mailbox = await self._accepted(request, generation)
            if generation.stream:
                height, width = generation.height, generation.width
                if height is None or width is None:
                    height, width = self.offer.all_sizes[0]
                events = OpenAIEvents(f"{width}x{height}", generation.format)
                return self._stream(request, events, order, mailbox, generation, start)
            pictures = await self._pictures(request, order, mailbox)
        except BadRequest as error:
            raise error.with_names(request.state.names) from None
        facts = self._facts(order, generation, start)
        facts["output_format"] = facts.pop("format")
        return await run_in_threadpool(_images_response, facts, "data", pictures)

    async def _read(self, body: dict[str, Any]) -> Generation:
        """The fields of a body, checked: those with a picture in a thread, as its head is read."""
        if "image" in body:
            async with self._reading:
                return await run_in_threadpool(read_generation, self.offer, body)
        return read_generation(self.offer, body)

    async def _body(self, request: Request) -> dict[str, Any]:
        """The body, which has so many bytes and seconds at most."""
        content, size, most = bytearray(), 0, self.limits.max_body_bytes

        async def read() -> None:
            nonlocal size
            async for chunk in request.stream():
                size += len(chunk)
                if size <= most:
                    content.extend(chunk)
                elif size > most + MAX_DROPPED:
                    return

        try:
            await asyncio.wait_for(read(), self.limits.body_seconds)
        except TimeoutError:
            message = f"the body did not arrive within {self.limits.body_seconds:g} s: send it faster"
            raise BadRequest(message, status=408) from None
        if size > most:
            message = f"a body may have {most} bytes: send a smaller one, pictures no larger than is drawn"
            raise BadRequest(message, status=413)
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            message = "send the header Content-Type: application/json"
            raise BadRequest(message, status=415, param="Content-Type")
        if len(content) > LARGE:
            async with self._reading:
                return await run_in_threadpool(read_json, bytes(content))
        return read_json(bytes(content))

    async def _accepted(self, request: Request, generation: Generation) -> tuple[Order, Mailbox]:
        """The order of a request, accepted and checked."""
        prompts, options = call_of(self.offer, generation)
        mailbox = Mailbox(generation.num_images)
        steps = self.offer.steps(generation.num_inference_steps, options.get("solver"))
        order = Order(
            id=secrets.token_hex(8),
            client=client_of(request.client.host if request.client else ""),
            prompts=prompts,
            options=options,
            seed=generation.seed,
            num_images=generation.num_images,
            num_steps=self.offer.steps_left(steps, options),
            guided=self.offer.guided(generation.guidance_scale),
            listener=mailbox.put,
            format=generation.format,
            progress=generation.stream,
            previews=generation.previews,
            timeout=generation.timeout,
        )
        log = {"id": order.id, "images": order.num_images, "steps": order.num_steps, "seed": order.seed}
        request.state.log |= log | ({"prompts": prompts} if self._log_prompts else {})
        refusal = self.service.submit(order)
        if refusal is not None:
            status = STATUS_OF_REFUSAL.get(refusal.type, 429)
            raise BadRequest(
                refusal.message, status=status, type=refusal.type, retry_after=refusal.retry_after or None
            )
        try:
            failure = await self._unless_gone(request, mailbox.accepted())
        except BaseException:
            self.service.cancel(order.id)
            raise
        if failure is not None:
            raise self._failure(failure)
        return order, mailbox

    async def _pictures(self, request: Request, order: Order, mailbox: Mailbox) -> list[Picture]:
        """All pictures of an order, in order; it is cancelled where nobody waits for them any more."""

        async def collect() -> list[Picture]:
            pictures: dict[int, Picture] = {}
            async for event in mailbox.events():
                if isinstance(event, Failed):
                    raise self._failure(event)
                if isinstance(event, Picture):
                    pictures[event.image] = event
            return [pictures[image] for image in sorted(pictures)]

        try:
            return await self._unless_gone(request, collect())
        finally:
            self.service.cancel(order.id)  # without effect on one that is done

    async def _unless_gone(self, request: Request, work: Any) -> Any:
        """The result of the work; `ClientDisconnect` where the client is gone before."""

        async def gone() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if tasks[0].done():
                return tasks[0].result()
            raise ClientDisconnect
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _failure(self, failure: Failed) -> BadRequest:
        """What the engine says, as an error of the API."""
        param = failure.param or param_in(failure.message, [*self.offer.fields])
        kind = "invalid_request_error" if failure.type == "invalid_request" else failure.type
        status = STATUS_OF_FAILURE[failure.type]
        return BadRequest(failure.message, status=status, type=kind, param=param if status == 400 else None)

    def _facts(self, order: Order, generation: Generation, start: float) -> dict[str, Any]:
        """What an answer says besides its images."""
        seconds = time.perf_counter() - start
        self.figures.seconds.observe(seconds)
        return {
            "id": order.id,
            "created": int(time.time()),
            "model": self.offer.name,
            "seed": generation.seed,
            "format": generation.format,
            "num_inference_steps": self.offer.steps(
                generation.num_inference_steps, order.options.get("solver")
            ),
            "latency_ms": round(1000 * seconds, 2),
        }

    def _stream(
        self,
        request: Request,
        names: Any,
        order: Order,
        mailbox: Mailbox,
        generation: Generation,
        start: float,
    ) -> Response:
        """Server-sent events; the order is cancelled where nobody reads them any more."""
        request.state.log["ended"] = "cancelled"  # if nothing else happens

        def failed(failure: Failed) -> dict[str, Any]:
            error = self._failure(failure).with_names(request.state.names)
            request.state.log["ended"] = error.type
            return error.body()

        def done(slots: int | None) -> dict[str, Any]:
            del request.state.log["ended"]
            return self._facts(order, generation, start) | {"slots": slots}

        first = {"id": order.id, "seed": generation.seed}
        events = stream(names, mailbox.events(), first, failed, done, self.limits.ping_seconds)
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no", "X-Request-Id": order.id}
        return EventStream(events, headers).then(lambda: self.service.cancel(order.id))

    # ---------------------------------------------------------------- everything else

    async def cancel(self, request: Request) -> Response:
        """DELETE /requests/{id}."""
        order_id = request.path_params["id"]
        if not self.service.cancel(order_id):
            raise BadRequest(
                "there is no such request, or it is done", status=404, type="not_found", param="id"
            )
        return JSONResponse({"id": order_id, "cancelled": True})

    async def models(self, request: Request) -> Response:
        """GET /models."""
        offer = self.offer
        return JSONResponse(
            {
                "models": [
                    {
                        "id": offer.name,
                        "family": offer.family,
                        "sizes": [{"height": height, "width": width} for height, width in offer.all_sizes],
                        "solvers": [*offer.solvers],
                        "num_classes": offer.num_classes,
                        "class_names": [*offer.class_names],
                        "slots": [*self.service.sizes],
                        "max_images": offer.max_images,
                        "max_steps": offer.max_steps,
                        "default_steps": offer.steps(None, None),
                        "default_guidance_scale": offer.default_guidance_scale,
                    }
                ]
            }
        )

    async def openai_models(self, request: Request) -> Response:
        """GET /v1/models."""
        model = {"id": self.offer.name, "object": "model", "created": 0, "owned_by": "jaxldm"}
        return JSONResponse({"object": "list", "data": [model]})

    async def openapi(self, request: Request) -> Response:
        """GET /openapi.json."""
        return JSONResponse(document(self.offer))

    async def metrics(self, request: Request) -> Response:
        """GET /metrics."""
        content, kind = self.figures.text()
        return Response(content, headers={"Content-Type": kind})

    async def health(self, request: Request) -> Response:
        """GET /health: 500 where only a new process helps."""
        broken = self.service.broken
        return JSONResponse({"status": "broken" if broken else "ok"}, 500 if broken else 200)

    async def ready(self, request: Request) -> Response:
        """GET /ready."""
        ready = self.service.ready
        return JSONResponse({"ready": ready}, 200 if ready else 503)


def _images_response(facts: dict[str, Any], name: str, pictures: list[Picture]) -> JSONResponse:
    texts = [base64.b64encode(picture.content).decode() for picture in pictures]
    images: Any = texts if name == "images" else [{"b64_json": text} for text in texts]
    return JSONResponse(facts | {name: images})

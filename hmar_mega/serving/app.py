"""The endpoints: pictures from classes, the same as they appear, edits, the model, health, metrics, and the page."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from hmar_mega import __version__
from hmar_mega.errors import UserError
from hmar_mega.inference.options import ClassNames, format_mask_schedule
from hmar_mega.inference.pipeline import ImageModel
from hmar_mega.serving.batcher import Batcher, Busy, Closing, Failure, Job, Part
from hmar_mega.serving.gate import App, Gate, Refused
from hmar_mega.serving.metrics import Metrics
from hmar_mega.serving.pictures import encode_base64, encode_png
from hmar_mega.serving.requests import Asked, EditRequest, ImagesRequest, Reader, explain
from hmar_mega.serving.runner import Draw, Drawn, Repaint, Runner, Watch

T = TypeVar("T")

#: Files of the page, beside this one.
PAGE = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}

#: Seconds of silence after which a stream says that it lives.
PULSE = 5.0


@dataclass(frozen=True)
class Limits:
    """What the service allows.

    Attributes:
        max_batch: images computed together.
        max_wait: seconds that a request waits for company.
        max_queue: images that may wait.
        max_count: images a request.
        max_body: bytes a request.
        timeout: seconds that a body may take to arrive, and then its images to be made.
    """

    max_batch: int = 16
    max_wait: float = 0.01
    max_queue: int = 256
    max_count: int = 16
    max_body: int = 10_000_000
    timeout: float = 60.0


class Service:
    """The model, its queue and what is counted."""

    def __init__(self, model: ImageModel, names: ClassNames, limits: Limits, title: str) -> None:
        self.model, self.names, self.limits, self.title = model, names, limits, title
        self.reader = Reader(model, names, limits.max_count)
        self.runner = Runner(model, limits.max_batch)
        self.batcher = Batcher(
            self.runner, limits.max_batch, limits.max_wait, limits.max_queue,
            lambda images, seconds: self.metrics.batch(images, seconds),
        )  # fmt: skip
        self.metrics = Metrics(lambda: self.batcher.waiting)

    async def draw(self, request: Request, kind: Draw | Repaint, asked: Asked) -> list[Drawn]:
        """The finished pictures of a request; it is cancelled when its client leaves."""
        pictures: list[Drawn] = [None] * len(asked.items)  # type: ignore[list-item]

        async def collect() -> None:
            async for part in self.follow(kind, asked):
                pictures[part.first : part.first + len(part.results)] = part.results

        await _unless_gone(request, collect())
        return pictures

    async def follow(self, kind: Draw | Watch | Repaint, asked: Asked, pulse: bool = False) -> AsyncIterator[Part]:
        """What becomes of a request, as it comes; at most `limits.timeout` seconds long.

        Args:
            pulse: also give a part without results whenever nothing came for a while.

        Raises:
            Refused: when the queue is full, time is up or the service stops.
            UserError: when the batch found a mistake in what was asked for.
        """
        inbox: asyncio.Queue[Part | Failure] = asyncio.Queue()
        loop, deadline, left = asyncio.get_running_loop(), time.monotonic() + self.limits.timeout, len(asked.items)

        def deliver(event: Part | Failure) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(inbox.put_nowait, event)

        job = Job(kind, asked.items, deliver, deadline)
        try:
            self.batcher.submit(job)
        except Busy as err:
            raise Refused(429, "busy", str(err), Retry_After=str(err.retry_after)) from None
        except Closing as err:
            raise Refused(503, "stopping", str(err)) from None
        try:
            while left:
                patience = deadline - time.monotonic()
                try:
                    event = await asyncio.wait_for(inbox.get(), min(patience, PULSE) if pulse else patience)
                except TimeoutError:
                    if time.monotonic() >= deadline:
                        raise self._late() from None
                    yield Part(0, 0, False, [])
                    continue
                if isinstance(event, Failure):
                    raise self._refusal(event.error)
                left -= len(event.results) if event.last else 0
                yield event
        finally:
            self.batcher.cancel(job)

    def about(self) -> dict[str, Any]:
        """What `GET /v1/model` answers."""
        model, own = self.model, self.model.sample_settings()
        return {
            "name": self.title,
            "version": __version__,
            "device": model.device.type,
            "num_classes": model.num_classes,
            "classes": list(self.names.names) or None,
            "resolution": model.schedule.grid * model.tokenizer.config.downsample,
            "patch_nums": list(model.schedule.patch_nums),
            "mask_branch": model.model.has_mask_branch,
            "defaults": {
                "cfg": own.cfg_scale,
                "mask_cfg": own.mask_cfg,
                "top_k": own.top_k,
                "top_p": own.top_p,
                "mask_schedule": format_mask_schedule(own.mask_schedule),
            },
            "limits": {
                "count": self.limits.max_count,
                "body_bytes": self.limits.max_body,
                "seconds": self.limits.timeout,
                "queue": self.limits.max_queue,
            },
        }

    def health(self) -> tuple[int, str]:
        """HTTP status and word: `ok`; `stopped` without a worker; `stuck` when a batch runs longer than any request."""
        if not self.batcher.alive:
            return 503, "stopped"
        return (503, "stuck") if self.batcher.busy_seconds > self.limits.timeout else (200, "ok")

    def pictures(self, asked: Asked, drawn: list[Drawn]) -> list[dict[str, Any]]:
        """Pictures as JSON holds them. Encodes: takes time."""
        return [
            {
                "png": encode_base64(picture.pixels),
                "class": item.label,
                "name": self.names.names[item.label] if self.names.names else None,
                "seed": item.seed,
                **({} if picture.kept_psnr is None else {"kept_psnr": round(picture.kept_psnr, 2)}),
            }
            for item, picture in zip(asked.items, drawn, strict=True)
        ]

    def _late(self) -> Refused:
        return Refused(
            504, "timeout", f"not done within {self.limits.timeout:g} s, the time in the queue included; ask for "
            "fewer images, or try again later",
        )  # fmt: skip

    def _refusal(self, error: Exception) -> Exception:
        if isinstance(error, Closing):
            return Refused(503, "stopping", str(error))
        if isinstance(error, TimeoutError):
            return self._late()
        if isinstance(error, UserError):
            return error
        return Refused(500, "failed", f"computing the images failed: {type(error).__name__}; the log has the reason")


def create_app(service: Service, token: str | None, hosts: frozenset[str] | None) -> App:
    """The ASGI application; see `gate.Gate` for token and hosts."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.batcher.start()
        yield
        await run_in_threadpool(service.batcher.close)

    app = FastAPI(title="hmar-mega", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    _add_error_handlers(app, service)
    _add_pictures(app, service)
    _add_facts(app, service)
    return Gate(app, service.metrics, token, hosts, service.limits.max_body, service.limits.timeout)


def _add_pictures(app: FastAPI, service: Service) -> None:
    """The endpoints that compute."""

    @app.post("/v1/images")
    async def images(body: ImagesRequest, request: Request) -> Response:
        """Finished images: JSON with PNGs in base64, or one PNG for `Accept: image/png`."""
        asked = await run_in_threadpool(service.reader.images, body)
        return await _answer(service, request, Draw(asked.settings), asked)

    @app.post("/v1/images/stream")
    async def stream(body: ImagesRequest, request: Request) -> Response:
        """Server-sent events: `start`, `scale` for each scale, `done`; or `error`."""
        asked = await run_in_threadpool(service.reader.images, body)
        parts = service.follow(Watch(asked.settings), asked, pulse=True)

        async def begin() -> Part:
            return await anext(parts)

        first = await _unless_gone(request, begin())  # so that a full queue is a status, and not an event
        return StreamingResponse(_events(service, asked, first, parts), media_type="text/event-stream")

    @app.post("/v1/edits")
    async def edits(body: EditRequest, request: Request) -> Response:
        """Versions of a picture with a region made anew; answers as /v1/images does."""
        asked = await run_in_threadpool(service.reader.edits, body)
        return await _answer(service, request, Repaint(asked.settings, body.paste, body.feather), asked)


def _add_facts(app: FastAPI, service: Service) -> None:
    """The endpoints that tell."""

    @app.get("/v1/model")
    async def model() -> dict[str, Any]:
        """What the model is and what requests may ask for."""
        return service.about()

    @app.get("/healthz")
    async def health() -> Response:
        """200 while images can be computed, else 503."""
        status, word = service.health()
        return JSONResponse({"status": word}, status)

    @app.get("/metrics")
    async def metrics() -> Response:
        """Counts in Prometheus's text format."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    def page(name: str, media_type: str) -> Callable[[], Awaitable[Response]]:
        content = files("hmar_mega.serving").joinpath(name).read_bytes()

        async def give() -> Response:
            return Response(content, media_type=media_type)

        return give

    for path, (name, media_type) in PAGE.items():
        app.add_api_route(path, page(name, media_type), include_in_schema=False)

    @app.get("/favicon.ico", include_in_schema=False)
    async def icon() -> Response:
        return Response(status_code=204)


async def _answer(service: Service, request: Request, kind: Draw | Repaint, asked: Asked) -> Response:
    started = time.perf_counter()
    as_png = "image/png" in request.headers.get("accept", "")
    if as_png and len(asked.items) > 1:
        raise UserError(f"image/png holds one picture and {len(asked.items)} were asked for: ask for one, or take JSON")
    drawn = await service.draw(request, kind, asked)
    if as_png:
        return Response(await run_in_threadpool(encode_png, drawn[0].pixels), media_type="image/png")
    pictures = await run_in_threadpool(service.pictures, asked, drawn)
    seconds = round(time.perf_counter() - started, 4)
    return JSONResponse({"images": pictures, "changes": list(asked.changes), "seconds": seconds})


async def _events(service: Service, asked: Asked, first: Part, parts: AsyncIterator[Part]) -> AsyncIterator[str]:
    """The text of a stream."""
    started = time.perf_counter()
    sides = service.model.schedule.patch_nums
    yield _event("start", {"images": len(asked.items), "scales": list(sides)})
    try:
        part: Part | None = first
        while part is not None:
            if part.results:
                pngs = await run_in_threadpool(_encoded, part.results)
                items = asked.items[part.first : part.first + len(pngs)]
                shown = [
                    {"png": png, "class": item.label, "seed": item.seed}
                    for png, item in zip(pngs, items, strict=True)
                ]  # fmt: skip
                facts = {"scale": part.scale + 1, "side": sides[part.scale], "first": part.first, "images": shown}
                yield _event("scale", facts)
            else:
                yield ": waiting\n\n"
            part = await anext(parts, None)
        yield _event("done", {"seconds": round(time.perf_counter() - started, 4)})
    except (Refused, UserError) as err:
        service.metrics.error(err.kind if isinstance(err, Refused) else "invalid")
        yield _event("error", {"error": str(err)})
    except asyncio.CancelledError:
        service.metrics.error("cancelled")
        raise
    finally:
        await parts.aclose()  # type: ignore[attr-defined]


def _encoded(drawn: Sequence[Drawn]) -> list[str]:
    return [encode_base64(one.pixels) for one in drawn]


def _event(name: str, data: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled, and Refused raised, when the client leaves."""
    task, gone = asyncio.create_task(work), asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Refused(499, "cancelled", "the client left")
        return await task
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)  # its job leaves the queue before we go on


async def _gone(request: Request) -> None:
    """Return when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _add_error_handlers(app: FastAPI, service: Service) -> None:
    """Every error is `{"error": one sentence}`."""

    @app.exception_handler(UserError)
    async def invalid(_: Request, err: Exception) -> Response:
        service.metrics.error("invalid")
        return JSONResponse({"error": str(err)}, 422)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, err: Exception) -> Response:
        service.metrics.error("invalid")
        assert isinstance(err, RequestValidationError)
        return JSONResponse({"error": explain(request.url.path, err.errors())}, 422)

    @app.exception_handler(Refused)
    async def refused(_: Request, err: Exception) -> Response:
        assert isinstance(err, Refused)
        service.metrics.error(err.kind)
        return JSONResponse({"error": str(err)}, err.status, err.headers)

    @app.exception_handler(HTTPException)
    async def other(request: Request, err: Exception) -> Response:
        assert isinstance(err, HTTPException)
        service.metrics.error("invalid")
        text = f"{request.method} {request.url.path}: {err.detail}; GET /openapi.json lists what there is"
        if err.status_code == 400:  # FastAPI's, for whatever keeps Python from reading a body
            text = "the body cannot be read as JSON in UTF-8, is nested too deeply, or has a number that is too long"
        return JSONResponse({"error": text}, err.status_code, err.headers)

    @app.exception_handler(Exception)
    async def failed(_: Request, err: Exception) -> Response:
        service.metrics.error("failed")
        return JSONResponse({"error": f"an error of the service ({type(err).__name__}); the log has the reason"}, 500)

"""What stands before the endpoints: allowed hosts, the token, the size and speed of bodies, headers, and the count.

Plain ASGI, so that an answer that streams is not held up and a client that leaves is noticed.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from hmar_mega.serving.metrics import Metrics

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

#: Open to everyone: the page, which asks for the token itself, and whether the service lives.
OPEN = ("/", "/page.css", "/page.js", "/favicon.ico", "/healthz")

#: Counted by name; every other path counts as "other".
COUNTED = (*OPEN, "/metrics", "/openapi.json", "/v1/model", "/v1/images", "/v1/images/stream", "/v1/edits")

#: The page loads nothing from elsewhere, is shown in no frame, and sends its address nowhere.
HEADERS = {
    b"content-security-policy": b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    b"img-src 'self' data: blob:; form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"cache-control": b"no-store",
}


class Refused(Exception):
    """A request that does not reach its endpoint.

    Attributes:
        status: of HTTP.
        kind: under which the error is counted.
        headers: of the answer.
    """

    def __init__(self, status: int, kind: str, text: str, **headers: str) -> None:
        super().__init__(text)
        self.status, self.kind = status, kind
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


@dataclass(frozen=True)
class Gate:
    """Lets requests through to `app`.

    Attributes:
        token: that every request but those of `OPEN` must bring; None: none is needed.
        hosts: names under which the service may be addressed; None: any. Keeps other sites' pages from reaching a
            service on this machine under a name of theirs.
        max_body: bytes.
        body_seconds: in which a body must have arrived.
    """

    app: App
    metrics: Metrics
    token: str | None
    hosts: frozenset[str] | None
    max_body: int
    body_seconds: float

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # uvicorn refuses WebSockets by itself
        started, status = time.perf_counter(), 0

        async def send_noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), *HEADERS.items()]
            await send(message)

        try:
            self._check(scope)
            if scope["method"] in ("POST", "PUT", "PATCH"):
                receive = replay(await self._body(scope, receive), receive)
            await self.app(scope, receive, send_noting)
        except Refused as err:
            self.metrics.error(err.kind)
            await answer(send_noting, err.status, str(err), err.headers)
        except asyncio.CancelledError:  # by the server, which stops and whose patience has ended
            self.metrics.error("stopping")
            if not status:
                await answer(send_noting, 503, "the service stopped before the images were made", {})
        finally:
            path = scope["path"]
            # status 0: the client left before an answer, which logs of other servers call 499
            self.metrics.request(path if path in COUNTED else "other", status or 499, time.perf_counter() - started)

    def _check(self, scope: MutableMapping[str, Any]) -> None:
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1")
        if self.hosts is not None and _name(host) not in self.hosts:
            raise Refused(
                403, "denied",
                f"host {host!r} is not how this service may be addressed; allowed are {', '.join(sorted(self.hosts))} "
                "(a proxy must send one of them; --host lets others in, with a token)",
            )  # fmt: skip
        if self.token is None or scope["path"] in OPEN:
            return
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        if kind.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self.token.encode()):
            raise Refused(
                401, "denied", "a token is needed: send it as the header Authorization: Bearer TOKEN",
                WWW_Authenticate="Bearer",
            )  # fmt: skip

    async def _body(self, scope: MutableMapping[str, Any], receive: Receive) -> bytes:
        said = dict(scope["headers"]).get(b"content-length", b"0")
        too_large = Refused(
            413, "too_large",
            f"the body is larger than the {self.max_body:,} bytes allowed (--max-body); send a smaller picture",
            Connection="close",
        )  # fmt: skip
        if said.isdigit() and int(said) > self.max_body:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(self.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Refused(400, "cancelled", "the client left before its request was complete")
                    body += message.get("body", b"")
                    if len(body) > self.max_body:
                        raise too_large
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise Refused(
                408, "slow", f"the body did not arrive within {self.body_seconds:g} s", Connection="close"
            ) from None


def replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives `body` first, then what `receive` gives: that the client has left."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return pending.pop() if pending else await receive()

    return again


async def answer(send: Send, status: int, text: str, headers: dict[str, str]) -> None:
    """Send `{"error": text}`."""
    body = json.dumps({"error": text}).encode()
    own = {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}
    encoded = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in own.items()]
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})


def _name(host: str) -> str:
    """`localhost:8000` → localhost, `[::1]:8000` → ::1."""
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0].lower()

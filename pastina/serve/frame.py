"""Around every request: its id, its line in the log, its count, and an answer whatever happens.

HEAD is here the same as GET: whoever sends the answer leaves out its body.
"""

import asyncio
import itertools
import logging
import re
import secrets
import time
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pastina.serve.metrics import Metrics
from pastina.serve.refusals import Refusal, internal, json_response

logger = logging.getLogger("pastina.serve")
_ID = re.compile(rb"[A-Za-z0-9._\-]{1,64}")
TEI = "/predict"  # its clients know errors of another form
_AGAIN_S = 5  # seconds in which another process should be there
_PREFIX, _NUMBERS = secrets.token_hex(4), itertools.count(1)
_QUIET = {
    "/healthz",
    "/readyz",
    "/metrics",
}  # asked every few seconds, and logged for debugging only; answered however much is going on


class Frame:
    """ASGI middleware; see the top of the file. most: requests at once."""

    def __init__(self, app: ASGIApp, metrics: Metrics, most: int) -> None:
        self.app, self.metrics, self.most = app, metrics, most
        self._running = 0
        self._counters: dict[tuple[str, int], Any] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0
        scope["request_id"] = number = _request_id(scope)
        method = scope["method"]
        if method == "HEAD":  # a copy: the sender goes by the method in its own
            scope = {**scope, "method": "GET"}

        async def see(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"].append((b"x-request-id", number.encode()))
            await send(message)

        try:
            refusal = await self._run(scope, receive, see)
            if refusal is not None and not status:
                await _response(scope, self.metrics, refusal)(scope, receive, see)
        finally:
            self._tell(scope, method, status, time.perf_counter() - started)

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> Refusal | None:
        """Let the request be answered; what to say if it was not."""
        is_counted = scope["path"] not in _QUIET
        if is_counted and self._running >= self.most:
            words = f"{self.most} requests are under way, and no more are taken."
            return Refusal("busy", words, headers={"Retry-After": "1"})
        self._running += is_counted
        try:
            await self.app(scope, receive, send)
        except asyncio.CancelledError:  # the server ends, and all that it waits for is an answer
            words = "The server ends, and the time for running requests is over."
            return Refusal("stopping", words, headers={"Retry-After": str(_AGAIN_S)})
        except Exception:
            logger.exception("a bug", extra={"request_id": scope["request_id"]})
            return internal()
        finally:
            self._running -= is_counted
        return None

    def _tell(self, scope: Scope, method: str, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path_format", "none")
        key = (route, status)
        if key not in self._counters:
            self._counters[key] = self.metrics.requests.labels(route, str(status))
        self._counters[key].inc()
        level = logging.DEBUG if scope["path"] in _QUIET else logging.INFO
        if not logger.isEnabledFor(level):
            return
        about = {
            "request_id": scope["request_id"],
            "method": method,
            "path": scope["path"][:300],
            "status": status,
            "ms": round(1000 * seconds, 2),
        }
        for name in ("caller", "texts", "refused"):
            if name in scope:
                about[name] = scope[name]
        # Logger.log would look first for the line of the program that says it, at every request
        record = logging.LogRecord(logger.name, level, "", 0, "request", None, None)
        vars(record).update(about)
        logger.handle(record)


def _request_id(scope: Scope) -> str:
    """The client's own id, if it is a harmless one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _ID.fullmatch(value):
            return value.decode()
    return f"{_PREFIX}{next(_NUMBERS):08x}"


async def refuse(request: Request, refusal: Refusal) -> Response:
    """The response to a request that is not answered."""
    return _response(request.scope, request.app.state.server.metrics, refusal)


def _response(scope: Scope, metrics: Metrics, refusal: Refusal) -> Response:
    scope["refused"] = refusal.code
    metrics.rejected.labels(refusal.code).inc()
    body = refusal.tei_body() if scope["path"] == TEI else refusal.body(scope["request_id"])
    return json_response(body, refusal.status, refusal.headers)

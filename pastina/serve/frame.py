"""Around every request: its id, its line in the log, its count, and an answer whatever happens."""

import asyncio
import itertools
import logging
import re
import secrets
import time
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pastina.serve.metrics import Metrics
from pastina.serve.refusals import Refusal, json_response

logger = logging.getLogger("pastina.serve")
_ID = re.compile(rb"[A-Za-z0-9._\-]{1,64}")
_PREFIX, _NUMBERS = secrets.token_hex(4), itertools.count(1)
_QUIET = {
    "/healthz",
    "/readyz",
    "/metrics",
}  # asked every few seconds, and logged for debugging only


class Frame:
    """ASGI middleware; see the top of the file."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics
        self._counters: dict[tuple[str, int], Any] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0
        scope["request_id"] = number = _request_id(scope)

        async def see(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"].append((b"x-request-id", number.encode()))
            await send(message)

        try:
            await self.app(scope, receive, see)
        except asyncio.CancelledError:
            status = status or 499
            raise
        except Exception:
            logger.exception("a bug", extra={"request_id": number})
            if not status:
                refusal = Refusal("internal", "This should not happen; the log says more.")
                response = json_response(refusal.body(number), refusal.status)
                await response(scope, receive, see)
        finally:
            self._tell(scope, number, status, time.perf_counter() - started)

    def _tell(self, scope: Scope, number: str, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path_format", "none")
        key = (route, status)
        if key not in self._counters:
            self._counters[key] = self.metrics.requests.labels(route, str(status))
        self._counters[key].inc()
        level = logging.DEBUG if scope["path"] in _QUIET else logging.INFO
        if not logger.isEnabledFor(level):
            return
        about = {
            "request_id": number,
            "method": scope["method"],
            "path": scope["path"][:300],
            "status": status,
            "ms": round(1000 * seconds, 2),
        }
        for name in ("caller", "texts", "refused"):
            if name in scope:
                about[name] = scope[name]
        logger.log(level, "request", extra=about)


def _request_id(scope: Scope) -> str:
    """The client's own id, if it is a harmless one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _ID.fullmatch(value):
            return value.decode()
    return f"{_PREFIX}{next(_NUMBERS):08x}"


async def refuse(request: Request, refusal: Refusal) -> Any:
    """The response to a request that is not answered."""
    scope = request.scope
    scope["refused"] = refusal.code
    request.app.state.server.metrics.rejected.labels(refusal.code).inc()
    return json_response(refusal.body(scope["request_id"]), refusal.status, refusal.headers)

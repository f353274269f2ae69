"""uvicorn's connection, closed when a client takes too long to say what it wants."""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEADER_S = (
    10.0  # from the first byte of a request, or from the connection, to the end of its headers
)


class GuardedProtocol(HttpToolsProtocol):
    """A connection on which somebody sends headers byte by byte does not stay open for long."""

    _guard: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._set_guard()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unset_guard()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        self._set_guard()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._unset_guard()
        super().on_headers_complete()

    def _set_guard(self) -> None:
        self._unset_guard()
        self._guard = self.loop.call_later(HEADER_S, self.transport.close)

    def _unset_guard(self) -> None:
        if self._guard is not None:
            self._guard.cancel()
            self._guard = None

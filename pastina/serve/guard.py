"""uvicorn's connection, closed when a client is too slow, or says more than anybody has to say."""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from pastina.serve.joined import Joined

HEAD_S = 10.0  # from the connection, or the first byte of a request, to the end of its headers
WRITE_S = 30.0  # in which a client must have taken something of what is written to it
MAX_HEAD = 65_536  # bytes of a request's first line and headers
_TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\n"
    b"connection: close\r\ncontent-length: 0\r\n\r\n"
)


class GuardedProtocol(HttpToolsProtocol):
    """A connection on which somebody sends or reads byte by byte, or not at all, does not stay open.

    body_s: seconds from the end of a request's headers to that of its body, whoever reads it.
    """

    body_s = 60.0
    _reading: asyncio.TimerHandle | None = None
    _writing: asyncio.TimerHandle | None = None
    _stage = (0, True)  # how many requests began, and whether the last one is in its headers still
    _is_between = False  # requests: then uvicorn's own timer runs
    _timed: tuple[int, bool] | None = None  # the stage that the timer is for
    _head = 0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._joined = Joined(transport)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._reading, self._writing):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._is_between or not self._stage[1]:
            self._head = 0
        else:
            self._head += len(data)
        if self._head > MAX_HEAD and not self.transport.is_closing():
            self.transport.write(_TOO_LARGE)
            self.transport.close()
        self._watch()

    def on_message_begin(self) -> None:
        self._stage, self._is_between = (self._stage[0] + 1, True), False
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._stage = (self._stage[0], False)
        super().on_headers_complete()
        self.cycle.transport = self._joined  # type: ignore[assignment]

    def on_message_complete(self) -> None:
        self._is_between = True
        super().on_message_complete()

    def _watch(self) -> None:
        """A timer for what has begun to come and is not whole; what came at once costs none."""
        stage = None if self._is_between else self._stage
        if self.transport.is_closing():
            self._expect_writing()
            stage = None
        if stage == self._timed:
            return
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None
        self._timed = stage
        if stage is not None:
            seconds = HEAD_S if stage[1] else self.body_s
            self._reading = self.loop.call_later(seconds, self.transport.abort)

    # -----------------------------------------------------------------------------------------------
    # What the client does not read

    def pause_writing(self) -> None:
        super().pause_writing()
        self._expect_writing()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._writing is not None and not self.transport.is_closing():
            self._writing.cancel()
            self._writing = None

    def on_response_complete(self) -> None:
        self._joined.flush()
        super().on_response_complete()
        if self.transport.is_closing():
            self._expect_writing()

    def timeout_keep_alive_handler(self) -> None:
        self.transport.abort()  # closing would wait for what nobody reads

    def _expect_writing(self) -> None:
        if self._writing is None:
            size = self.transport.get_write_buffer_size()
            self._writing = self.loop.call_later(WRITE_S, self._see_writing, size)

    def _see_writing(self, size: int) -> None:
        """End it if the client took nothing since so many bytes were left to write."""
        self._writing = None
        if self.transport.get_write_buffer_size() < size:
            self._expect_writing()
        else:
            self.transport.abort()


def guarded_protocol(read_s: float) -> type[GuardedProtocol]:
    """The protocol for a server that gives a body these seconds, and an upload six times as many."""
    return type("GuardedProtocol", (GuardedProtocol,), {"body_s": 6 * read_s + 5})

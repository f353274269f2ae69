"""uvicorn's connection, closed when a client is too slow, says more than anybody has to say, or has
nothing to do while others want its place."""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from pastina.serve.connections import Places
from pastina.serve.joined import Joined

HEAD_S = 10.0  # from the connection, or the first byte of a request, to the end of its headers
WRITE_S = 30.0  # in which a client must have taken something of what is written to it
MOST_BEHIND = 64  # requests that wait on a connection for the one before them
MAX_HEAD = 65_536  # bytes of a request's first line and headers
_TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\n"
    b"connection: close\r\ncontent-length: 0\r\n\r\n"
)
_FIRST_LINE = len("GET  HTTP/1.1\r\n\r\n")  # without the path, and with the empty line at the end
_PER_HEADER = len(": \r\n")


class _HeadTooLarge(Exception):
    pass


class _TooManyBehind(Exception):
    pass


class GuardedProtocol(HttpToolsProtocol):
    """A connection on which somebody sends or reads byte by byte, or not at all, does not stay open.

    body_s: seconds from the end of a request's headers to that of its body, whoever reads it.
    places: of all connections of the server.
    """

    body_s = 60.0
    places: Places
    _reading: asyncio.TimerHandle | None = None
    _writing: asyncio.TimerHandle | None = None
    _stage = (0, True)  # how many requests began, and whether the last one is in its headers still
    _is_between = False  # requests: then uvicorn's own timer runs
    _timed: tuple[int, bool] | None = None  # the stage that the timer is for
    _head = 0  # bytes of a head that came whole
    _head_read = 0  # bytes read since a head began

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._joined = Joined(transport)
        if self.places.enter(self):
            self._watch()
        else:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.places.leave(self)
        for timer in (self._reading, self._writing):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        number, was_between = self._stage[0], self._is_between or not self._stage[0]
        super().data_received(data)
        if self._is_between or not self._stage[1]:
            self._head_read = 0
        elif self._stage[0] == number:
            self._head_read += len(data)
        else:  # a head began in this; where other requests stood before it, nobody knows
            is_alone = was_between and self._stage[0] == number + 1
            self._head_read = len(data) if is_alone else 0
        if self._head_read > MAX_HEAD and not self.transport.is_closing():
            self._refuse_head()
        self._watch()

    def on_message_begin(self) -> None:
        self._stage, self._is_between = (self._stage[0] + 1, True), False
        self._head = _FIRST_LINE
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._see_head(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._see_head(len(name) + len(value) + _PER_HEADER)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._stage = (self._stage[0], False)
        if len(self.pipeline) >= MOST_BEHIND:
            self.transport.abort()  # what was asked before is not answered: nobody who reads does this
            raise _TooManyBehind  # the parser stops
        super().on_headers_complete()
        self.cycle.transport = self._joined  # type: ignore[assignment]
        self.places.see(self, is_idle=False)

    def _see_head(self, size: int) -> None:
        self._head += size
        if self._head > MAX_HEAD:
            raise _HeadTooLarge  # the parser stops, and uvicorn sends a 400

    def send_400_response(self, msg: str) -> None:
        if self._head > MAX_HEAD:
            self._refuse_head()
        else:
            super().send_400_response(msg)

    def _refuse_head(self) -> None:
        self.transport.write(_TOO_LARGE)
        self.transport.close()

    def give_way(self) -> None:
        """Close it; for `Places`, while there is nothing to do."""
        self.transport.close()
        self._watch()

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
        self.places.see(self, is_idle=self.cycle.response_complete)  # or there are more behind it
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


def guarded_protocol(read_s: float, places: Places) -> type[GuardedProtocol]:
    """The protocol for a server that gives a body these seconds, and an upload six times as many."""
    values = {"body_s": 6 * read_s + 5, "places": places}
    return type("GuardedProtocol", (GuardedProtocol,), values)

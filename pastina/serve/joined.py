"""A connection to write to, on which the head of a response goes out together with its body."""

from typing import Any

_INTERIM = b"HTTP/1.1 100 "  # not the head of a response: the client waits for it


class Joined:
    """A transport for one response after the other: two writes to the system are one, which the client
    reads at once. What is held goes out with the next write, by `flush` or by `close`.
    """

    __slots__ = ("_held", "_transport")

    def __init__(self, transport: Any) -> None:
        self._transport, self._held = transport, b""

    def write(self, data: bytes) -> None:
        """Hold a head; write all else, behind what was held."""
        if self._held:
            self._transport.write(self._held + data)
            self._held = b""
        elif data.startswith(b"HTTP/") and not data.startswith(_INTERIM):
            self._held = data
        else:
            self._transport.write(data)

    def flush(self) -> None:
        """Write what is held."""
        if self._held:
            self.write(b"")

    def close(self) -> None:
        """Write what is held, and close."""
        self.flush()
        self._transport.close()

    def is_closing(self) -> bool:
        """Whether it is closed, or about to be."""
        return self._transport.is_closing()

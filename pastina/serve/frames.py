"""Messages between the two processes of a server: a length, and plain values behind it."""

import marshal
import struct
from typing import Any

_LENGTH = struct.Struct("<Q")


def pack(message: Any) -> bytes:
    """A message of None, numbers, strings, bytes, lists, tuples and dicts as bytes.

    marshal: both ends are the same Python, it is fast, and it makes plain values only.
    """
    content = marshal.dumps(message)
    return _LENGTH.pack(len(content)) + content


class Unpacker:
    """Bytes in, in any pieces; whole messages out.

    >>> unpacker = Unpacker()
    >>> content = pack(("ask", 1)) + pack("next")
    >>> unpacker.feed(content[:20]), unpacker.feed(content[20:])
    ([('ask', 1)], ['next'])
    """

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, content: bytes) -> list[Any]:
        """The messages that are whole by now."""
        self._rest += content
        found, start = [], 0
        while len(self._rest) - start >= _LENGTH.size:
            (size,) = _LENGTH.unpack_from(self._rest, start)
            end = start + _LENGTH.size + size
            if len(self._rest) < end:
                break
            found.append(marshal.loads(self._rest[start + _LENGTH.size : end]))
            start = end
        del self._rest[:start]
        return found

"""The process that looks at the folder again and again, and tells what changed there.

`python -m pastina.serve.lookout FD PLACE POLL_S LOG_LEVEL`, started by `Lookout`. Thousands of small
questions to the file system would each hand the interpreter to another thread and wait for it again,
beside an engine that is busy; a process of its own disturbs nobody, and says something only where
something changed. It ends when the socket's other end is closed, whatever became of the process there.
"""

import logging
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress

from pastina.errors import PastinaError
from pastina.serve.frames import Unpacker, pack
from pastina.serve.logs import configure_logs
from pastina.serve.store import Signature, Store, open_store

Found = Mapping[str, Signature | None]  # None: gone
logger = logging.getLogger("pastina.serve")

_READ = 1 << 18
SHARE = 0.1  # of its time that a large folder is looked at, at most
_PAUSE = 1.0  # seconds before a process that died is started again
_END = 5.0  # seconds that it gets to end


class Lookout:
    """The process, seen from the one that wants to hear of changes. place: as for `open_store`."""

    def __init__(self, place: str, poll_s: float, log_level: str = "info") -> None:
        self._arguments = [place, str(poll_s), log_level]
        self._line: socket.socket | None = None
        self.process: subprocess.Popen[bytes] | None = None

    def hear(self, seconds: float) -> list[tuple[str, float, Found | str]]:
        """What it says next; [] if that takes longer. It is started when first asked, or dead.

        Each is what, when, and: "all", the start of a look (monotonic seconds), the signature of each
        task, as the first thing that any process says; "changed", the start, what is other than at
        its last look; "failed", the start, why the place cannot be read.
        """
        line = self._line or self._begin()
        if not select.select([line], [], [], seconds)[0]:
            return []
        try:
            content = line.recv(_READ)
        except ConnectionError:
            content = b""
        if content:
            return self._unpacker.feed(content)
        logger.error("the lookout died", extra={"status": self.close()})
        time.sleep(_PAUSE)
        return []

    def _begin(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        with theirs:
            number = theirs.fileno()
            command = [sys.executable, "-m", "pastina.serve.lookout", str(number)]
            self.process = subprocess.Popen(
                [*command, *self._arguments],
                pass_fds=[number],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # whoever interrupts the server does not mean this process
            )
        self._line, self._unpacker = ours, Unpacker()
        return ours

    def close(self) -> int | None:
        """End the process; how it ended."""
        if self._line is not None:
            self._line.close()
            self._line = None
        if self.process is None:
            return None
        with suppress(subprocess.TimeoutExpired):
            return self.process.wait(_END)
        self.process.kill()
        return self.process.wait()


def main() -> None:
    """Look and tell until the other end is gone."""
    for meant in (signal.SIGINT, signal.SIGTERM):  # for the server, which closes our line
        signal.signal(meant, signal.SIG_IGN)
    number, place, poll_s, log_level = sys.argv[1:]
    configure_logs(log_level)
    with socket.socket(fileno=int(number)) as line, suppress(ConnectionError):
        _look(line, place, float(poll_s))


def _look(line: socket.socket, place: str, poll_s: float) -> None:
    store: Store | None = None
    known: dict[str, Signature] | None = None
    while True:
        started = time.monotonic()
        message = None
        try:
            store = store or open_store(place)
            found = store.scan()
        except Exception as error:  # of whatever fsspec reaches
            reason = str(error) if isinstance(error, PastinaError) else repr(error)
            message = ("failed", started, reason)
        else:
            if known is None:
                message = ("all", started, found)
            elif changed := _differences(known, found):
                message = ("changed", started, changed)
            known = found
        if message is not None:
            line.sendall(pack(message))
        took = time.monotonic() - started
        if select.select([line], [], [], max(poll_s, took / SHARE))[0]:
            return  # nothing is ever said to us: the other end is gone


def _differences(known: Mapping[str, Signature], found: Mapping[str, Signature]) -> Found:
    changed: dict[str, Signature | None] = dict.fromkeys(known.keys() - found.keys())
    return changed | {name: own for name, own in found.items() if known.get(name) != own}


if __name__ == "__main__":
    main()

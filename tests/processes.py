"""The command line in processes of its own that need not import torch each time.

A fork server holds what is imported; each call is a process with its own pid, signals and exit code.
"""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(
    [
        *("pastina.cli", "pastina.training.fit", "pastina.training.evaluate", "pastina.records"),
        *("pastina.bench.run", "sklearn.metrics", "scipy.stats"),
    ]
)
TIMEOUT = 240


@dataclass(frozen=True)
class Done:
    """How a command ended. A negative code is the number of the signal that ended it."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Command:
    """A command that runs."""

    process: ForkServerProcess
    folder: Path

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    @property
    def err(self) -> str:
        """What it has written to stderr so far."""
        path = self.folder / "err"
        return path.read_text() if path.is_file() else ""

    def wait_until(self, is_so: Callable[[], bool]) -> bool:
        """Whether it came to this before the command ended."""
        stop = time.monotonic() + TIMEOUT
        while not is_so():
            assert time.monotonic() < stop, f"it does not happen: {self.err}"
            if not self.process.is_alive():
                return is_so()
            time.sleep(0.002)
        return True

    def done(self) -> Done:
        """Wait for its end."""
        self.process.join(TIMEOUT)
        assert self.process.exitcode is not None, f"it does not end: {self.err}"
        return Done(self.process.exitcode, (self.folder / "out").read_text(), self.err)


def start(
    args: Sequence[str], folder: Path, stdin: Path | None = None, *, forks_runs: bool = True
) -> Command:
    """`pastina ARGS` in this folder, its output in a hidden folder beside it.

    forks_runs: the runs of a grid get what is imported here as well, which saves ten seconds; but they
    do not end if the command is killed, as they should.
    """
    output = folder.parent / f".{folder.name}-{time.monotonic_ns()}"
    output.mkdir()
    process = _server.Process(target=_run, args=(list(args), folder, output, stdin, forks_runs))
    process.start()
    return Command(process, output)


def pastina(*args: str, folder: Path, stdin: Path | None = None) -> Done:
    """The end of `pastina ARGS` in this folder. stdin: a file, or nothing to read."""
    return start(args, folder, stdin).done()


def _run(args: list[str], folder: Path, output: Path, stdin: Path | None, forks_runs: bool) -> None:
    for number, path, flags in (
        (0, stdin or Path(os.devnull), os.O_RDONLY),
        (1, output / "out", os.O_WRONLY | os.O_CREAT),
        (2, output / "err", os.O_WRONLY | os.O_CREAT),
    ):
        os.dup2(os.open(path, flags, 0o644), number)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115  # multiprocessing closed it
    os.chdir(folder)
    sys.argv = ["pastina", *args]
    # as in a terminal; a suite that a shell runs in the background was told to ignore Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import torch

    from pastina.bench import apart
    from pastina.cli import main

    torch.set_num_threads(1)
    if forks_runs:
        apart._context = lambda: multiprocessing.get_context("fork")
    main()

"""The process that answers: `python -m pastina.serve.process FD SETTINGS`, started by `link`.

It ends when the socket's other end is closed, whatever became of the process there.
"""

import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from pastina.errors import AdapterError, PastinaError
from pastina.serve.frames import Unpacker, pack
from pastina.serve.logs import configure_logs

_READ = 1 << 18
_SWITCH = 0.001  # seconds for which a thread may keep others waiting for the interpreter
logger = logging.getLogger("pastina.serve")


class _Line:
    """The socket; any thread may send."""

    def __init__(self, number: int) -> None:
        self._socket = socket.socket(fileno=number)
        self._lock = threading.Lock()

    def send(self, message: tuple[Any, ...]) -> None:
        with self._lock:
            self._socket.sendall(pack(message))

    def receive(self) -> bytes:
        return self._socket.recv(_READ)


def main() -> None:
    """Load, then answer until the other end is gone."""
    for number in (signal.SIGINT, signal.SIGTERM):  # they are for the other process, which tells us
        signal.signal(number, signal.SIG_IGN)
    line, settings = _Line(int(sys.argv[1])), json.loads(sys.argv[2])
    configure_logs(settings["log_level"])
    try:
        try:
            _serve(line, settings)
        except PastinaError as error:
            line.send(("failed", str(error)))
    except (BrokenPipeError, ConnectionResetError):
        pass  # the other process is gone, and so are we
    # not through torch's and Python's teardown, which other threads may be in the middle of
    logging.shutdown()
    os._exit(0)


def _serve(line: _Line, settings: Mapping[str, Any]) -> None:
    import torch

    from pastina.serve.lookout import Lookout
    from pastina.serve.pauses import settle
    from pastina.serve.registry import Registry, choose_backbone
    from pastina.serve.store import FolderStore, open_store
    from pastina.serve.worker import Worker
    from pastina.tasks import Tasks

    began = time.monotonic()
    sys.setswitchinterval(_SWITCH)
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    threads = torch.get_num_threads()
    store = open_store(settings["folder"])
    backbone = settings["backbone"] or choose_backbone(store)
    tasks = Tasks(backbone, precision=settings["precision"])
    worker = Worker(
        tasks,
        line.send,
        max_tokens=settings["max_tokens"],
        wait_s=settings["wait_ms"] / 1000,
        threads=1 if tasks.engine.device.type == "cuda" else threads,
    )
    registry = Registry(store, tasks.bank, lambda changes: line.send(("tasks", changes)))
    is_over = threading.Event()
    threading.Thread(target=_listen, args=(line, worker, registry, is_over), daemon=True).start()
    while not registry.scan():
        if is_over.wait(settings["poll_s"]):
            return
    files, seconds = tasks.bank.backbone.files, time.monotonic() - began
    about = {"backbone": files.name, "digest": files.digest, "threads": threads}
    about |= {"precision": tasks.engine.encoder.precision, "tasks": len(tasks), "seconds": seconds}
    settle()
    logger.info("ready", extra=about | {"kernels": tasks.engine.kernels})
    line.send(("ready", about))
    # what a link meant when we began
    place = str(store.root) if isinstance(store, FolderStore) else settings["folder"]
    lookout = Lookout(place, settings["poll_s"], settings["log_level"])
    looking = (lookout, settings["poll_s"], is_over)
    threading.Thread(target=registry.run, args=looking, daemon=True).start()
    worker.run()
    is_over.set()


def _listen(line: _Line, worker: Any, registry: Any, is_over: threading.Event) -> None:
    """Pass on what comes in, until nothing can come any more."""
    unpacker, errands = Unpacker(), threading.Lock()
    try:
        while content := line.receive():
            for verb, *rest in unpacker.feed(content):
                match verb:
                    case "ask":
                        worker.put(*rest)
                    case "call off":
                        worker.call_off(*rest)
                    case "install" | "remove":
                        arguments = (line, registry, errands, verb, *rest)
                        threading.Thread(target=_run_errand, args=arguments, daemon=True).start()
    except OSError:
        pass
    finally:
        is_over.set()
        worker.stop()


def _run_errand(
    line: _Line, registry: Any, errands: threading.Lock, verb: str, id: int, *rest: Any
) -> None:
    """Change the folder; one change at a time."""
    with errands:
        try:
            done = {"done": getattr(registry, verb)(*rest)}
        except AdapterError as error:
            done = {"refused": str(error)}
        except Exception as error:  # the disk is full, the bucket is gone
            logger.exception("the folder could not be changed")
            done = {"failed": f"{type(error).__name__}: the folder could not be changed."}
    line.send(("done", id, done))


if __name__ == "__main__":
    main()

"""Work in a process of its own: its memory is its own, and if it dies the others go on."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from pastina.errors import PastinaError
from pastina.training.events import Event, OnEvent
from pastina.training.fit import stop_on_signal
from pastina.training.loop import Stopped

_POLL = 0.2  # seconds
_IMPORTED_ONCE = ["pastina.bench.execute", "sklearn.metrics", "scipy.stats"]


class Died(PastinaError):
    """The process ended without a word."""


def run_apart(work: Callable[..., Any], *args: Any, on_event: OnEvent) -> Any:
    """`work(*args, on_event)` in another process; what it tells and returns, or raises, comes here.

    Ctrl-C and SIGTERM are passed on once. If this process is killed, the other one ends at its next
    event.

    Raises:
        Stopped: somebody asked, and the other process has ended. Died: it was killed.
    """
    context = _context()
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_enter, args=(work, args, there))
    with stop_on_signal() as is_asked_to_stop:
        process.start()
        there.close()
        told = _listen(process, here, on_event, is_asked_to_stop)
        process.join()
    if told is None and is_asked_to_stop():
        raise Stopped("Stopped. The same command goes on.")
    if told is None:
        raise Died(_epitaph(process.exitcode))
    if isinstance(told, BaseException):
        raise told
    return told[0]


def _context() -> Any:
    way = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(way)
    context.set_forkserver_preload(_IMPORTED_ONCE)
    return context


def _listen(
    process: Any, here: Connection, on_event: OnEvent, is_asked_to_stop: Callable[[], bool]
) -> Any:
    """The last word of a process: what it raised, or its answer in a tuple; None: there was none."""
    is_passed_on = False
    while True:
        if is_asked_to_stop() and not is_passed_on:
            process.terminate()
            is_passed_on = True
        if not here.poll(_POLL):
            continue
        try:
            what, value = here.recv()
        except EOFError:
            return None
        if what == "event":
            on_event(value)
        else:
            return value if what == "raised" else (value,)


def _enter(work: Callable[..., Any], args: tuple[Any, ...], there: Connection) -> None:
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)  # Ctrl-C in a terminal reaches the parent alone, which passes it on once

    def tell(event: Event) -> None:
        _send(there, "event", event)

    try:
        answer = work(*args, tell)
    except PastinaError as error:
        _send(there, "raised", error)
    else:
        _send(there, "answer", answer)


def _send(there: Connection, what: str, value: Any) -> None:
    try:
        there.send((what, value))
    except BrokenPipeError:  # nobody waits for this work any more; what is saved is kept
        os._exit(1)


def _epitaph(code: int | None) -> str:
    if code is None or code >= 0:
        return f"The process of the run ended with code {code}."
    name = signal.Signals(-code).name
    hint = " Was there too little memory?" if -code == signal.SIGKILL else ""
    return f"The process of the run was ended by {name}.{hint}"

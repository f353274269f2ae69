"""The HTTP side's end of the engine: starts its process, asks, hears, starts it again if it dies."""

import asyncio
import itertools
import json
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from pastina.errors import PastinaError
from pastina.serve.frames import Unpacker, pack

Text = tuple[str, str, str | None]  # task, text, second text
Answer = dict[str, Any]  # see worker.py; with `refused` and `sentence` where there is none
logger = logging.getLogger("pastina.serve")

_PAUSES = (0.5, 1.0, 2.0, 5.0, 10.0)  # seconds before each new start of a process that died
_STABLE = 60.0  # seconds after which a process is taken to be well
# The engine has threads of its own for its cores. Those of libraries would only take them from each
# other, and from this side: idle ones shall sleep, and a few texts are read where they are.
_CALM = {"OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false"}
_END = 5.0  # seconds that it gets to end


class EngineGone(Exception):
    """The engine is not there, or died with the request in its hands."""


class Link(asyncio.Protocol):
    """The engine, as the HTTP side sees it.

    tasks: what is told of each task, by name. about: of the engine; None until it is ready.
    on_batch: hears the measures of each batch.
    """

    def __init__(
        self, settings: Mapping[str, Any], on_batch: Callable[[Mapping[str, Any]], None]
    ) -> None:
        self.settings, self.on_batch = settings, on_batch
        self.tasks: dict[str, dict[str, Any]] = {}
        self.about: dict[str, Any] | None = None
        self.failure: str | None = None
        self.num_starts = 0
        self.num_changes = 0  # of the names of tasks
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._numbers = itertools.count()
        self._out: list[bytes] = []
        self._transport: asyncio.Transport | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._gone = asyncio.Event()

    async def start(self) -> None:
        """Begin to keep a process running; does not wait until it is ready."""
        self._keeper = asyncio.create_task(self._keep())

    async def stop(self) -> None:
        """End the process."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        await self._end()
        self._lose()

    async def ask(
        self,
        texts: Sequence[Text],
        seconds: float,
        caller: str,
        *,
        is_raw: bool = False,
        keep_end: bool = False,
    ) -> tuple[list[Answer], float]:
        """The answers in order, and how long the request waited for its turn. Callers take turns.

        is_raw: scores as the head gives them, before softmax or sigmoid. keep_end: of texts that are too
        long the start is left out.

        Raises:
            EngineGone: there is nobody to answer. TimeoutError: not within these seconds. Whoever
            cancels this calls the request off.
        """
        number = next(self._numbers)
        # the clock is the same in all processes of a machine
        deadline = time.monotonic() + seconds
        future = self._send("ask", number, deadline, list(texts), caller, is_raw, keep_end)
        timer = asyncio.get_running_loop().call_later(seconds, _expire, future)
        try:
            return await future
        finally:
            timer.cancel()
            if self._waiting.pop(number, None) is not None:  # nobody waits for the answer any more
                self._write(pack(("call off", number)))

    async def install(self, name: str, files: Mapping[str, bytes]) -> dict[str, Any]:
        """What the registry says to a new adapter: `done`, `refused` or `failed`."""
        return await self._send("install", next(self._numbers), name, dict(files))

    async def remove(self, name: str) -> dict[str, Any]:
        """What the registry says to a task's end: `done`, `refused` or `failed`."""
        return await self._send("remove", next(self._numbers), name)

    def _send(self, verb: str, number: int, *rest: Any) -> "asyncio.Future[Any]":
        if self._transport is None or self.about is None:
            raise EngineGone
        future = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        self._write(pack((verb, number, *rest)))
        return future

    def _write(self, frame: bytes) -> None:
        """What is said within one turn of the loop goes out at once."""
        if not self._out:
            asyncio.get_running_loop().call_soon(self._flush)
        self._out.append(frame)

    def _flush(self) -> None:
        out, self._out = self._out, []
        if self._transport is not None:
            self._transport.write(b"".join(out))

    # -----------------------------------------------------------------------------------------------
    # What the engine says

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport, self._unpacker = cast(asyncio.Transport, transport), Unpacker()

    def data_received(self, data: bytes) -> None:
        for verb, *rest in self._unpacker.feed(data):
            match verb:
                case "answers":
                    self._hear_answers(*rest)
                case "tasks":
                    for name, info in rest[0].items():
                        self.num_changes += (info is None) or name not in self.tasks
                        if info is None:
                            self.tasks.pop(name, None)
                        else:
                            self.tasks[name] = info
                case "done":
                    self._settle(*rest)
                case "ready":
                    self.about = rest[0]
                case "failed":
                    self.failure = rest[0]

    def _hear_answers(self, done: list[Any], measures: Mapping[str, Any] | None) -> None:
        for number, answers, waited in done:
            self._settle(number, (answers, waited))
        if measures is not None:
            self.on_batch(measures)

    def _settle(self, number: int, result: Any) -> None:
        future = self._waiting.pop(number, None)
        if future is not None and not future.done():
            future.set_result(result)

    def connection_lost(self, exc: Exception | None) -> None:
        self._lose()
        self._gone.set()

    def _lose(self) -> None:
        """Whoever waits hears that nobody will answer."""
        self._transport, self.about = None, None
        waiting, self._waiting = self._waiting, {}
        for future in waiting.values():
            if not future.done():
                future.set_exception(EngineGone())

    # -----------------------------------------------------------------------------------------------
    # The process

    async def _keep(self) -> None:
        """Start the process, and again whenever it died; a first start that fails is the end."""
        deaths = 0
        while True:
            started = time.monotonic()
            await self._begin()
            await self._gone.wait()
            was_told = self.failure
            await self._end()
            if was_told is not None and self.num_starts == 1:
                return
            deaths = 0 if time.monotonic() - started > _STABLE else deaths + 1
            pause = _PAUSES[min(deaths, len(_PAUSES)) - 1] if deaths else _PAUSES[0]
            logger.error("the engine died", extra={"reason": was_told, "again_in_s": pause})
            self.failure = None
            await asyncio.sleep(pause)

    async def _begin(self) -> None:
        self._gone.clear()
        self.tasks.clear()
        self.num_changes += 1
        ours, theirs = socket.socketpair()
        with theirs:
            number = theirs.fileno()
            command = [sys.executable, "-m", "pastina.serve.process", str(number)]
            self._process = subprocess.Popen(
                [*command, json.dumps(dict(self.settings))],
                pass_fds=[number],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={**_CALM, **os.environ},
            )
        self.num_starts += 1
        loop = asyncio.get_running_loop()
        await loop.create_connection(lambda: self, sock=ours)

    async def _end(self) -> None:
        """Close our end, by which the process knows that it is over, and wait for it."""
        if self._transport is not None:
            self._transport.close()
        process = self._process
        if process is None:
            return
        stop = time.monotonic() + _END
        while process.poll() is None and time.monotonic() < stop:
            await asyncio.sleep(0.02)
        if process.poll() is None:
            process.kill()
        process.wait()

    async def ready(self) -> None:
        """Wait until it is ready, or was stopped.

        Raises:
            PastinaError: the first start failed.
        """
        while self.about is None:
            if self._keeper is None or self._keeper.cancelled():
                return  # it is over
            if self._keeper.done():
                raise PastinaError(self.failure or "The engine does not start.")
            await asyncio.sleep(0.02)


def _expire(future: "asyncio.Future[Any]") -> None:
    if not future.done():
        future.set_exception(TimeoutError())

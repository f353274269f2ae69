"""The engine's end of the queue: requests in, batches through the engine, answers out.

Everything that waits stands in lanes: first texts, then what the tokenizer made of them. Several threads
work, each on a batch of its own, so that none waits for another within a batch; any thread may bring
requests and call them off.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from pastina.answering import answers, as_row, checked_row
from pastina.bank import Task
from pastina.data.encode import Example
from pastina.data.rows import Row
from pastina.errors import DataError
from pastina.serve.lanes import Lanes
from pastina.tasks import Tasks, check_room

Send = Callable[[tuple[Any, ...]], None]
logger = logging.getLogger("pastina.serve")

_SHORT_TEXT, _SHORT_TOKENS = 256, 64  # characters, tokens
_READ = 32_768  # characters that go through the tokenizer between two batches, about
_LONG_TEXTS = 8_192  # of them, those of long texts
_LONG_TOKENS = 128  # of a batch of long pieces on a CPU, which short ones may have to wait for
_LEAST = 48  # tokens of a batch that are not left for another thread
_TOKENS = 192  # of a batch for each core, where it gets several


@dataclass(slots=True)
class Asked:
    """A request. answers: in its order; a dict with `refused` where there is none.

    is_raw: scores are wanted as the head gives them.
    """

    id: int
    caller: str
    deadline: float
    arrived: float
    answers: list[Any]
    missing: int
    is_raw: bool = False
    waited: float = 0.0


@dataclass(slots=True)
class _Line:
    """One text (or pair) of a request: what its task makes of it so far."""

    asked: Asked
    place: int
    task: Task
    row: Row
    examples: list[Example] = field(default_factory=list)
    logits: list[torch.Tensor | None] = field(default_factory=list)
    missing: int = 0
    is_refused: bool = False


class Worker:
    """Answers requests in batches of at most `max_tokens` tokens.

    wait_s: after a pause, how long to wait for more before a batch begins, while others are being
    answered to. threads: how many work at the same time; a large batch that comes alone gets the cores
    of those that have nothing to do. send: takes ("answers", [(id, answers, seconds waited)], measures
    of the batch).
    """

    def __init__(
        self, tasks: Tasks, send: Send, *, max_tokens: int, wait_s: float, threads: int = 1
    ) -> None:
        self.tasks, self.send = tasks, send
        self.max_tokens, self.wait_s, self.threads = max_tokens, wait_s, threads
        self._turn = threading.Lock()  # of whoever takes from the lanes
        self._books = threading.Lock()  # on requests and how far they are
        self._num_busy = 0  # threads with a batch
        long = max_tokens // 2 if tasks.engine.device.type == "cuda" else _LONG_TOKENS
        self._texts: Lanes[_Line] = Lanes(_SHORT_TEXT, _LONG_TEXTS)
        self._pieces: Lanes[tuple[_Line, int]] = Lanes(_SHORT_TOKENS, long)
        self._came: list[tuple[Asked, list[_Line]]] = []
        self._called_off: set[int] = set()
        self._changed = threading.Condition()
        self._is_over = False
        self._rows_before = 0  # of the last batch

    def put(
        self,
        id: int,
        deadline: float,
        texts: Sequence[tuple[str, str, str | None]],
        caller: str,
        is_raw: bool = False,
        keep_end: bool = False,
    ) -> None:
        """A request: for each text the name of its task, the text, and the second one or None.

        caller: whoever asks; callers take turns. is_raw: scores before softmax or sigmoid. keep_end: of
        texts that are too long the start is left out.
        All that one request asks of a task is answered by one version of it.
        """
        number = len(texts)
        asked = Asked(id, caller, deadline, time.monotonic(), [None] * number, number, is_raw)
        lines = []
        versions: dict[str, Task | None] = {}
        for place, (name, text, pair) in enumerate(texts):
            if name not in versions:
                versions[name] = self._find(name)
            task = versions[name]
            if task is None:
                _refuse(asked, place, "unknown_task", f"There is no task {name[:200]!r}.")
            else:
                given = text if pair is None else (text, pair)
                row = as_row(given, f"inputs[{place}]", keep_end)
                lines.append(_Line(asked, place, task, row))
        if not lines:
            self._send([asked])
            return
        with self._changed:
            self._came.append((asked, lines))
            self._changed.notify()

    def call_off(self, id: int) -> None:
        """What this request still waits for is not worked on."""
        with self._changed:
            self._called_off.add(id)
            self._changed.notify()

    def stop(self) -> None:
        """Let `run` end."""
        with self._changed:
            self._is_over = True
            self._changed.notify()

    def run(self) -> None:
        """Work until somebody calls `stop`. Where one thread fails, all end, and its error is raised."""
        failures: list[BaseException] = []

        def work() -> None:
            try:
                self._work()
            except BaseException as error:
                failures.append(error)
                self.stop()

        others = [threading.Thread(target=work) for _ in range(self.threads - 1)]
        for other in others:
            other.start()
        work()
        for other in others:
            other.join()
        if failures:
            raise failures[0]

    def _work(self) -> None:
        while (batch := self._next()) is not None:
            if batch:
                self._answer(batch)

    def _next(self) -> list[tuple[_Line, int]] | None:
        """What to work on, which may be nothing; None when it is over."""
        with self._turn:
            if not self._take_in():
                return None
            # short ones and long ones, where both wait
            self._read(self._texts.take(_READ) + self._texts.take(_READ))
            with self._books:
                share = max(_LEAST, self._pieces.cost // self.threads)
                batch = self._on_time(self._pieces.take(min(self.max_tokens, share)))
                self._num_busy += bool(batch)
                return batch

    def _find(self, name: str) -> Task | None:
        try:
            return self.tasks.bank[name]
        except DataError:
            return None

    def _take_in(self) -> bool:
        """Wait for something to do; False when it is over."""
        with self._changed:
            if not (self._texts or self._pieces):
                while not self._came and not self._is_over:
                    self._called_off.clear()  # nobody waits
                    self._changed.wait()
                enough = self._rows_before // 2
                self._changed.wait_for(
                    lambda: self._is_over or len(self._came) >= enough, self.wait_s
                )
            came, self._came = self._came, []
            gone, self._called_off = self._called_off, set()
            is_over = self._is_over
        for asked, lines in came:
            if asked.id not in gone:
                for line in lines:
                    size = len(line.row.text) + len(line.row.text_pair or "")
                    self._texts.put(asked.caller, asked.id, line, size)
        for id in gone:
            self._drop(id)
        return not is_over

    def _drop(self, id: int) -> None:
        self._texts.drop(id)
        self._pieces.drop(id)

    def _on_time(self, batch: list[tuple[_Line, int]]) -> list[tuple[_Line, int]]:
        """The batch without what has no time left; that is refused."""
        now = time.monotonic()
        late = {line.asked.id: line.asked for line, _ in batch if line.asked.deadline < now}
        over = [asked for asked in late.values() if asked.missing > 0]
        for asked in late.values():
            self._drop(asked.id)
            for place, answer in enumerate(asked.answers):
                if answer is None:
                    _refuse(asked, place, "deadline", "The time for this request is over.")
        if over:
            self._send(over)
        return [(line, i) for line, i in batch if not line.is_refused and line.asked.id not in late]

    def _read(self, lines: list[_Line]) -> None:
        """Tokenize, and let the pieces wait for a batch; what cannot be read is refused."""
        readable: list[_Line] = []
        empty: list[_Line] = []
        refused: list[tuple[_Line, Exception]] = []
        for line in lines:
            try:
                line.row = checked_row(line.row, line.task)
                readable.append(line)
            except DataError as error:
                refused.append((line, error))
        for line, own in zip(readable, self._encode(readable), strict=True):
            if isinstance(own, Exception):
                refused.append((line, own))
                continue
            try:
                check_room(line.task, line.row, own)
            except DataError as error:
                refused.append((line, error))
                continue
            line.examples, line.logits, line.missing = own, [None] * len(own), len(own)
            if not own:  # nothing in it for the tokenizer
                empty.append(line)
            sizes = [len(example.input_ids) for example in own]
            for i, size in enumerate(sizes):
                piece, asked = (line, i), line.asked
                self._pieces.put(asked.caller, asked.id, piece, size, sum(sizes))
        with self._books:
            finished = [
                one for line, error in refused for one in _refused(line, "unreadable", error)
            ]
            for line in empty:
                finished += _finish(line, time.monotonic())
        if finished:
            self._send(finished)

    def _encode(self, lines: list[_Line]) -> list[list[Example] | Exception]:
        """All at once; if one of them makes that fail, each for itself."""
        if not lines:
            return []
        try:
            return list(self.tasks.encode([x.task for x in lines], [x.row for x in lines]))
        except Exception as error:
            if len(lines) > 1:
                return [own for line in lines for own in self._encode([line])]
            if not isinstance(error, DataError):
                logger.exception("a text could not be read", extra={"task": lines[0].task.name})
            return [error]

    def _answer(self, batch: list[tuple[_Line, int]]) -> None:
        started = time.monotonic()
        finished: list[Asked] = []
        num_tokens = sum(len(line.examples[i].input_ids) for line, i in batch)
        # of this thread alone
        cores = self.threads // max(1, self._num_busy)
        torch.set_num_threads(max(1, min(cores, num_tokens // _TOKENS)))
        logits = self._logits(batch)
        with self._books:
            self._num_busy -= 1
            for (line, i), own in zip(batch, logits, strict=True):
                if line.is_refused:
                    continue  # for another piece of it
                if isinstance(own, Exception):
                    finished += _refused(line, "engine", own)
                    continue
                line.logits[i] = own
                line.missing -= 1
                if not line.missing:
                    finished += _finish(line, started)
        self._rows_before = len(batch)
        measures = {
            "rows": len(batch),
            "tokens": num_tokens,
            "tasks": len({line.task.name for line, _ in batch}),
            "seconds": time.monotonic() - started,
        }
        self._send(finished, measures)

    def _logits(self, batch: list[tuple[_Line, int]]) -> list[torch.Tensor | Exception]:
        """What the engine makes of each piece; one that makes it fail takes none of the others along."""
        try:
            examples = [line.examples[i] for line, i in batch]
            return list(self.tasks.engine.logits(examples, [line.task for line, _ in batch]))
        except Exception as error:  # a bug, or no memory
            logger.exception("a batch failed", extra={"rows": len(batch)})
            if len(batch) == 1:
                return [RuntimeError(f"The engine failed with {type(error).__name__}.")]
            half = len(batch) // 2
            return self._logits(batch[:half]) + self._logits(batch[half:])

    def _send(self, finished: Sequence[Asked], measures: dict[str, float] | None = None) -> None:
        done = [(asked.id, asked.answers, asked.waited) for asked in finished]
        self.send(("answers", done, measures))


def _finish(line: _Line, started: float) -> list[Asked]:
    """Enter the answer; the request, if that was its last one."""
    if not line.asked.missing:
        return []  # it was refused as a whole meanwhile
    logits = [own for own in line.logits if own is not None]
    if not all(math.isfinite(sum(own.flatten().tolist())) for own in logits):
        return _refused(line, "not_finite", DataError(f"{line.task.name!r} answers no number."))
    (answer,) = answers(line.task, [line.row], line.examples, logits)
    task, asked = line.task, line.asked
    about = {"task": task.name, "digest": task.digest, "kind": task.kind}
    found = about | answer.as_dict()
    if asked.is_raw and answer.scores is not None:
        found["scores"] = dict(zip(task.labels, logits[0][0].tolist(), strict=True))
    asked.answers[line.place] = found
    asked.waited = asked.waited or started - asked.arrived
    asked.missing -= 1
    return [] if asked.missing else [asked]


def _refusal(code: str, sentence: str) -> dict[str, str]:
    return {"refused": code, "sentence": sentence}


def _refuse(asked: Asked, place: int, code: str, sentence: str) -> None:
    asked.answers[place] = _refusal(code, sentence)
    asked.missing -= 1


def _refused(line: _Line, code: str, error: Exception) -> list[Asked]:
    """Enter that there is no answer; the request, if that was its last one."""
    line.is_refused = True
    if not line.asked.missing:
        return []
    _refuse(line.asked, line.place, code, str(error))
    return [] if line.asked.missing else [line.asked]

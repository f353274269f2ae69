"""What the routes of a server share: who asks, what fits, who has to wait."""

import asyncio
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.requests import Request

from pastina.serve.access import Access, Caller
from pastina.serve.link import Answer, EngineGone, Link, Text
from pastina.serve.listing import Listing
from pastina.serve.metrics import Metrics
from pastina.serve.pace import Pace
from pastina.serve.refusals import Refusal
from pastina.serve.room import Room
from pastina.serve.settings import Settings

_WATCH = 0.05  # seconds after which we look whether the client is still there
_LOCAL = (b"localhost", b"127.0.0.1", b"[::1]")
_GUESS = 60.0  # seconds at most that a guess asks a client to wait
_EVER = 1e6  # eleven days: nobody waits longer, and timers of browsers reach that far


class Server:
    """One server; the routes have it as `request.app.state.server`."""

    def __init__(self, settings: Settings, access: Access) -> None:
        self.settings, self.access = settings, access
        self.metrics = Metrics(settings.metric_tasks)
        engine = settings.model_dump(
            mode="json",
            include={"folder", "backbone", "precision", "threads", "max_tokens", "wait_ms"}
            | {"poll_s", "log_level"},
        )
        self.link = Link(engine, self.metrics.see_batch)
        self.listing = Listing(self.link)
        self.uploading = asyncio.Semaphore(2)
        self._room = Room(settings.queue_texts, settings.queue_chars)
        self._pace = Pace()

    # -----------------------------------------------------------------------------------------------
    # Who asks

    def caller(self, request: Request) -> Caller:
        """Who asks.

        Raises:
            Refusal: nobody we know.
        """
        headers = dict(request.scope["headers"])
        host = headers.get(b"host", b"")
        if self.access.path is None and not _is_local(host, self.settings.host):
            # a page of some web site whose name leads to this machine
            raise Refusal("unknown_host", "Without tokens only this machine is answered.")
        caller = self.access.caller(headers.get(b"authorization"))
        if caller is None:
            raise Refusal(
                "unauthorized",
                "Show a token: Authorization: Bearer TOKEN.",
                headers={"WWW-Authenticate": "Bearer"},
            )
        request.scope["caller"] = caller.name
        return caller

    def take_from(self, caller: Caller, count: int) -> None:
        """Count so many texts, or one request of another sort, for a caller.

        Raises:
            Refusal: they were too fast.
        """
        if (wait := caller.wait_for(count)) > 0:
            raise Refusal(
                "rate_limit",
                f"{caller.name} may ask {caller.rate:g} texts a second; more in {wait:.1f} s.",
                headers=_retry_after(wait, most=_EVER),
            )

    # -----------------------------------------------------------------------------------------------
    # What there is

    def check_ready(self) -> None:
        """Nothing, if the engine can be asked.

        Raises:
            Refusal: it cannot, yet or for a moment.
        """
        if self.link.about is None:
            raise Refusal("not_ready", "The engine is not ready.", headers=_retry_after(1))

    def task(self, caller: Caller, name: str, *, with_near: bool = True) -> Mapping[str, Any]:
        """What is known of a task. with_near: look for names like it if there is none.

        Raises:
            Refusal: there is none of this name for this caller.
        """
        info = self.link.tasks.get(name)
        if info is None or not caller.may_call(name):
            near = self.listing.near(caller.patterns, name) if with_near else []
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise Refusal("unknown_task", f"There is no task {name[:200]!r}.{hint}", near=near)
        return info

    def answering_task(
        self, caller: Caller, name: str, *, with_near: bool = True
    ) -> Mapping[str, Any]:
        """A task that can answer; see `task`."""
        info = self.task(caller, name, with_near=with_near)
        if "digest" not in info:
            raise Refusal("unknown_task", f"{name!r} was refused: {info['refused']}")
        return info

    # -----------------------------------------------------------------------------------------------
    # Asking

    def check_number(self, count: int) -> None:
        """Nothing, if a request may have so many texts.

        Raises:
            Refusal: it may not.
        """
        if count > (limit := self.settings.max_texts):
            raise Refusal("too_large", f"{count} texts, and {limit} are the most at once.")

    def check_size(self, text: Text, where: str) -> None:
        """Nothing, if the text is short enough; `where` names it.

        Raises:
            Refusal: it is not.
        """
        size, limit = len(text[1]) + len(text[2] or ""), self.settings.max_chars
        if size > limit:
            raise Refusal(
                "too_large", f"{where} has {size:,} characters, and {limit:,} are the most."
            )

    async def answers(
        self,
        request: Request,
        caller: Caller,
        texts: Sequence[Text],
        seconds: float | None,
        *,
        is_raw: bool = False,
        keep_end: bool = False,
    ) -> list[Answer]:
        """The engine's answers in order; raw ones with scores before softmax or sigmoid.

        keep_end: of texts that are too long the start is left out.

        Raises:
            Refusal: too much is waiting, time is over, the client or the engine is gone.
        """
        self.check_ready()
        limit = (
            self.settings.deadline_s if seconds is None else min(seconds, self.settings.deadline_s)
        )
        size = self._take_room(caller, texts)
        try:
            self.take_from(caller, len(texts))
            started = time.perf_counter()
            with _WhileThere(request):
                found, waited = await self.link.ask(
                    texts, limit, caller.name, is_raw=is_raw, keep_end=keep_end
                )
        except TimeoutError:
            raise Refusal("deadline", f"There was no answer within {limit:g} s.") from None
        except EngineGone:
            raise Refusal(
                "not_ready", "The engine died and is started again.", headers=_retry_after(1)
            ) from None
        finally:
            self._room.leave(caller.name, len(texts), size)
        self._pace.count(len(texts))
        self.metrics.queue.observe(waited)
        self.metrics.latency.observe(time.perf_counter() - started)
        for answer in found:
            if "task" in answer:
                self.metrics.see_answer(answer["task"])
        return found

    def _take_room(self, caller: Caller, texts: Sequence[Text]) -> int:
        """Take room for these texts in the queue; their characters."""
        size = 0
        for _, text, pair in texts:
            size += len(text) + len(pair or "")
        if not self._room.fits(caller.name, len(texts), size):
            wait = self._room.texts / self._pace.texts_per_second
            raise Refusal("queue_full", "Too much is waiting.", headers=_retry_after(wait))
        if not self._room.texts:
            self._pace.begin()
        self._room.take(caller.name, len(texts), size)
        return size

    def refusal(self, answer: Answer, place: int, where: str) -> Refusal:
        """What the engine refused, as the client is told, who knows the text under another name."""
        sentence = answer["sentence"].replace(f"inputs[{place}]", where, 1)
        return Refusal(answer["refused"], sentence)

    def see_state(self) -> None:
        """Enter into the metrics what is not counted as it happens."""
        infos = list(self.link.tasks.values())
        self.metrics.tasks.set(sum("digest" in info for info in infos))
        self.metrics.refused.set(sum(info["refused"] is not None for info in infos))
        self.metrics.waiting.set(self._room.texts)
        self.metrics.ready.set(self.link.about is not None)
        self.metrics.starts.set(self.link.num_starts)


class _WhileThere:
    """Ends the block with a Refusal when the client goes away. Its body must have been read.

    Answers that come soon cost no task of their own for that.
    """

    __slots__ = ("_is_gone", "_owner", "_request", "_timer", "_watcher")

    def __init__(self, request: Request) -> None:
        self._request, self._is_gone = request, False
        self._watcher: asyncio.Task[None] | None = None

    def __enter__(self) -> None:
        self._owner = asyncio.current_task()
        self._timer = asyncio.get_running_loop().call_later(_WATCH, self._begin)

    def _begin(self) -> None:
        self._watcher = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
        self._is_gone = True
        assert self._owner is not None
        self._owner.cancel()

    def __exit__(self, kind: type[BaseException] | None, *about: object) -> None:
        self._timer.cancel()
        if self._watcher is not None:
            self._watcher.cancel()
        if self._is_gone and kind is asyncio.CancelledError:
            assert self._owner is not None
            self._owner.uncancel()
            raise Refusal("gone", "The client is gone.") from None


def _retry_after(seconds: float, most: float = _GUESS) -> dict[str, str]:
    return {"Retry-After": str(max(1, math.ceil(min(seconds, most))))}


def _is_local(host: bytes, bound: str) -> bool:
    """Whether the request asks this machine by a name of its own; bound: the address listened on."""
    name = host if host.endswith(b"]") else host.rpartition(b":")[0] or host
    return name.lower() in (*_LOCAL, bound.encode(), f"[{bound}]".encode())

"""Asking a server: `Client`, and `AsyncClient` for asyncio. Neither needs torch.

client = pastina.Client("http://127.0.0.1:8000")
client.predict("acme/intents", ["Where is my parcel?"])
"""

import asyncio
import random
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from pastina.errors import DataError, PastinaError, need

Text = str | tuple[str, str]
_AGAIN = (429, 503)  # too much, or not ready: both pass
_MOST = 256  # texts in a request; the server's own limit may be lower
_LONGEST = 300.0  # seconds that we wait before another try; who is to wait longer should know


class ServerError(PastinaError):
    """The server said no. status: of HTTP, 0 if it was not reached. code: a word for programs."""

    def __init__(self, message: str, status: int = 0, code: str = "unreachable") -> None:
        super().__init__(message)
        self.status, self.code = status, code


@dataclass(frozen=True, slots=True)
class Entity:
    """A stretch of the text: characters start (inclusive) to end (exclusive)."""

    entity_group: str
    score: float
    word: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer for one text; the kind of the task says which fields are filled.

    digest: of the adapter that answered. classify: label (None if it is below the threshold), score,
    scores. multilabel: labels, scores. regress: value. tag: entities. scores, labels: label -> score,
    the best first.
    """

    task: str
    digest: str
    kind: str
    label: str | None = None
    score: float | None = None
    scores: Mapping[str, float] | None = None
    labels: Mapping[str, float] | None = None
    value: float | None = None
    entities: tuple[Entity, ...] | None = None
    truncated: bool = False


class _Asker:
    """What both clients have in common: what is sent, and what is made of the reply."""

    def __init__(self, url: str, token: str | None, timeout: float, retries: int) -> None:
        self._httpx: Any = need("httpx", "serve")
        self._retries = retries
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._options = {"base_url": url.rstrip("/"), "headers": headers, "timeout": timeout}

    def _bodies(
        self, texts: Sequence[Text], top_k: int | None, threshold: float | None
    ) -> list[dict[str, Any]]:
        if isinstance(texts, str):
            raise DataError("predict takes a list of texts, not one. Write predict(task, [text]).")
        if isinstance(texts, bytes | Mapping) or not isinstance(texts, Iterable):
            raise DataError(f"predict takes a list of texts, not {_shown(texts)}.")
        inputs = [_input(text, place) for place, text in enumerate(texts)]
        options = {"top_k": top_k, "threshold": threshold}
        # of no texts the server is told as well: it knows whether that makes sense
        places = range(0, max(1, len(inputs)), _MOST)
        return [{"inputs": inputs[i : i + _MOST], **options} for i in places]

    def _pause(self, response: Any, turn: int) -> float | None:
        """Seconds until the next try; None: there is none, this is the reply."""
        if response.status_code not in _AGAIN or turn >= self._retries:
            return None
        try:
            seconds = float(response.headers.get("retry-after", ""))
        except ValueError:
            seconds = min(2.0**turn, 10.0)
        if not seconds <= _LONGEST:
            return None
        # not all clients at the same moment
        return max(seconds, 0.0) * random.uniform(1.0, 1.25)

    def _content(self, response: Any) -> Any:
        try:
            content = response.json() if response.content else None
        except ValueError:
            content = {}
        if response.is_success:
            return content
        error = content.get("error") if isinstance(content, dict) else None
        about: Mapping[str, Any] = error if isinstance(error, dict) else {}
        message = about.get("message") or f"The server answered {response.status_code}."
        raise ServerError(message, response.status_code, about.get("code", "unknown"))

    def _unreachable(self, error: Exception) -> ServerError:
        url = self._options["base_url"]
        return ServerError(f"{url} was not reached: {type(error).__name__}: {error}")


class Client(_Asker):
    """A server. Any thread may ask.

    token: to show. timeout: seconds for each try. retries: how often to try again when the server has
    too much to do or is not ready, after as many seconds as it says; not after more than five minutes.

    Raises:
        PastinaError: httpx is not installed.
    """

    def __init__(
        self, url: str, token: str | None = None, *, timeout: float = 60.0, retries: int = 5
    ) -> None:
        super().__init__(url, token, timeout, retries)
        self._client = self._httpx.Client(**self._options)

    def predict(
        self,
        task: str,
        texts: Sequence[Text],
        *,
        top_k: int | None = 5,
        threshold: float | None = None,
    ) -> list[Answer]:
        """One answer for each text (or pair of texts), in order.

        top_k: labels in `scores`, None: all. threshold: labels and spans below it are left out.

        Raises:
            ServerError: no such task, a text that cannot be read, no texts at all, no answer.
            DataError: not a list of texts and pairs.
        """
        found: list[Answer] = []
        for body in self._bodies(texts, top_k, threshold):
            found += _answers(self._call("POST", f"{_path(task)}/predict", json=body))
        return found

    def tasks(self, search: str = "") -> list[dict[str, Any]]:
        """What the server tells of its tasks, in order of their names."""
        found: list[dict[str, Any]] = []
        while True:
            page = self._call("GET", "/v1/tasks", params=_page(search, len(found)))
            found += page["tasks"]
            if not page["tasks"] or len(found) >= page["total"]:
                return found

    def put(self, task: str, archive: bytes) -> dict[str, Any]:
        """Upload an adapter, a zip or a tar; needs an admin token."""
        return self._call("PUT", _path(task), content=archive)

    def delete(self, task: str) -> None:
        """Remove a task; needs an admin token."""
        self._call("DELETE", _path(task))

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _call(self, method: str, path: str, **options: Any) -> Any:
        turn = 0
        while True:
            try:
                response = self._client.request(method, path, **options)
            except self._httpx.TransportError as error:
                raise self._unreachable(error) from error
            if (pause := self._pause(response, turn)) is None:
                return self._content(response)
            time.sleep(pause)
            turn += 1


class AsyncClient(_Asker):
    """A server, for asyncio; see `Client`."""

    def __init__(
        self, url: str, token: str | None = None, *, timeout: float = 60.0, retries: int = 5
    ) -> None:
        super().__init__(url, token, timeout, retries)
        self._client = self._httpx.AsyncClient(**self._options)

    async def predict(
        self,
        task: str,
        texts: Sequence[Text],
        *,
        top_k: int | None = 5,
        threshold: float | None = None,
    ) -> list[Answer]:
        """One answer for each text (or pair of texts), in order; see `Client.predict`."""
        found: list[Answer] = []
        for body in self._bodies(texts, top_k, threshold):
            found += _answers(await self._call("POST", f"{_path(task)}/predict", json=body))
        return found

    async def tasks(self, search: str = "") -> list[dict[str, Any]]:
        """What the server tells of its tasks, in order of their names."""
        found: list[dict[str, Any]] = []
        while True:
            page = await self._call("GET", "/v1/tasks", params=_page(search, len(found)))
            found += page["tasks"]
            if not page["tasks"] or len(found) >= page["total"]:
                return found

    async def put(self, task: str, archive: bytes) -> dict[str, Any]:
        """Upload an adapter, a zip or a tar; needs an admin token."""
        return await self._call("PUT", _path(task), content=archive)

    async def delete(self, task: str) -> None:
        """Remove a task; needs an admin token."""
        await self._call("DELETE", _path(task))

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def _call(self, method: str, path: str, **options: Any) -> Any:
        turn = 0
        while True:
            try:
                response = await self._client.request(method, path, **options)
            except self._httpx.TransportError as error:
                raise self._unreachable(error) from error
            if (pause := self._pause(response, turn)) is None:
                return self._content(response)
            await asyncio.sleep(pause)
            turn += 1


def _input(text: Any, place: int) -> Any:
    """A text or a pair as the server reads it."""
    parts = [text] if isinstance(text, str) else text
    is_text = isinstance(parts, list | tuple) and all(isinstance(part, str) for part in parts)
    if not is_text or (parts is text and len(parts) != 2):
        raise DataError(
            f"texts[{place}] is {_shown(text)}, neither a text nor a pair of texts. Give a str, or "
            "a tuple of two."
        )
    for part in parts:
        _check_characters(part, f"texts[{place}]")
    return text if isinstance(text, str) else {"text": parts[0], "text_pair": parts[1]}


def _check_characters(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where} holds half of a character (a lone surrogate) at {error.start}. Write it again."
        ) from None


def _shown(value: object) -> str:
    return f"{type(value).__name__} {value!r:.80}"


def _path(task: str) -> str:
    _check_characters(task, "The name of the task")
    if {".", ".."}.intersection(task.split("/")):
        raise DataError(f"There is no task {task!r}: a name has no parts '.' and '..'.")
    return f"/v1/tasks/{quote(task, safe='/')}"


def _page(search: str, offset: int) -> dict[str, Any]:
    return {"search": search, "offset": offset, "limit": 1000}


def _answers(content: Mapping[str, Any]) -> list[Answer]:
    return [_answer(one) for one in content["answers"]]


def _answer(one: Mapping[str, Any]) -> Answer:
    values = dict(one)
    for field in ("scores", "labels"):
        if values.get(field) is not None:
            values[field] = {pair["label"]: pair["score"] for pair in values[field]}
    if values.get("entities") is not None:
        values["entities"] = tuple(Entity(**entity) for entity in values["entities"])
    return Answer(**values)

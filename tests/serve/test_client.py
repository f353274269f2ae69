"""The Python client, against a real server, and what it makes of texts and of refusals."""

import asyncio
import time
from typing import Any

import httpx
import pytest

import pastina
from pastina.client import AsyncClient, ServerError
from pastina.errors import DataError
from tests.adapter_folder import LONG
from tests.serving import Running

pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])
TEXTS = (LONG, "saw", "we need the apple", "please send me a drill, and a plum")


def test_client(server: Running) -> None:
    with pastina.Client(server.url) as client:
        first, second = client.predict("acme/many", ["saw", LONG], top_k=None)
        assert first.label in (first.scores or {})
        assert sum((second.scores or {}).values()) == pytest.approx(1)
        (tagged,) = client.predict("acme/spans", [LONG])
        assert all(LONG[e.start : e.end] == e.word for e in tagged.entities or ())
        (pair,) = client.predict("pairs", [("saw", "plum")])
        assert pair.task == "pairs"
        assert len(client.predict("acme/topics", ["saw"] * 300)) == 300
        assert len(client.tasks("acme")) == 3
        with pytest.raises(ServerError, match="Did you mean 'acme/topics'") as caught:
            client.predict("acme/topic", ["saw"])
        assert (caught.value.status, caught.value.code) == (404, "unknown_task")
        with pytest.raises(pastina.PastinaError, match="a list of texts"):
            client.predict("acme/topics", "saw")


def test_async_client(server: Running) -> None:

    async def work() -> list[Any]:
        async with AsyncClient(server.url) as client:
            return await asyncio.gather(*(client.predict("acme/topics", [t]) for t in TEXTS))

    found = asyncio.run(work())
    with server.client() as client:
        response = client.post("/v1/tasks/acme/topics/predict", json={"inputs": TEXTS})
    assert [one.label for (one,) in found] == [one["label"] for one in response.json()["answers"]]


def test_the_client_lists_all_tasks(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are: it asks for one page after the other."""
    page = pastina.client._page
    monkeypatch.setattr(pastina.client, "_page", lambda *at: page(*at) | {"limit": 2})
    with pastina.Client(server.url) as client:
        assert [task["name"] for task in client.tasks()] == [
            "acme/many", "acme/spans", "acme/topics", "globex/number", "globex/sets", "pairs",
        ]  # fmt: skip
        assert len(client.tasks("acme")) == 3
        assert client.tasks("nothing") == []

    async def ask_again() -> int:
        async with AsyncClient(server.url) as client:
            return len(await client.tasks())

    assert asyncio.run(ask_again()) == 6


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["saw", "\ud800"], r"texts\[1\] holds half of a character .* at 0"),
        ([("saw", "x\udfff")], r"texts\[0\] holds half of a character .* at 1"),
        ([5], r"texts\[0\] is int 5, neither a text nor a pair of texts\."),
        ([("saw",)], r"texts\[0\] is tuple \('saw',\), neither"),
        ([("saw", "plum", "apple")], r"texts\[0\] is tuple .*, neither"),
        ([["saw"]], r"texts\[0\] is list"),
        ([("saw", None)], r"texts\[0\] is tuple"),
        ([{"text": "saw", "text_pair": "plum"}], r"texts\[0\] is dict"),
        (b"saw", "a list of texts, not bytes b'saw'"),
        ({"saw": 1}, "a list of texts, not dict"),
        (None, "a list of texts, not NoneType None"),
        ("saw", "a list of texts, not one"),
    ],
)
def test_what_is_no_text(texts: Any, words: str) -> None:
    """It is said before anything is sent."""
    with pastina.Client("http://127.0.0.1:1") as client, pytest.raises(DataError, match=words):
        client.predict("acme/topics", texts)


@pytest.mark.parametrize("task", ["\ud800", "..", "../tasks/acme/topics", "acme/./topics"])
def test_what_is_no_name(task: str) -> None:
    with pastina.Client("http://127.0.0.1:1") as client, pytest.raises(DataError, match="name"):
        client.predict(task, ["saw"])


def test_no_texts(server: Running) -> None:
    """Whether the task is there or not, nothing was asked."""
    with pastina.Client(server.url) as client:
        for task in ("acme/topics", "acme/nobody"):
            with pytest.raises(ServerError, match="at least 1 item") as caught:
                client.predict(task, [])
            assert caught.value.status == 422
        assert len(client.predict("acme/topics", iter(["saw"] * 257))) == 257  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("status", "header", "slept"),
    [
        (429, "7", 7.0),
        (503, "5", 5.0),
        (503, "-5", 0.0),
        (503, "Fri, 27 Nov 2026 07:00:00 GMT", 1.0),
        (429, "301", None),
        (429, "nan", None),
        (429, "inf", None),
        (404, "1", None),
    ],
)
def test_another_try(
    status: int, header: str, slept: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the time that the server says; who would have to wait for long hears of it instead."""
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    replies = [
        httpx.Response(status, headers={"Retry-After": header}, json={}),
        httpx.Response(200, json={"answers": [{"task": "x", "digest": "d", "kind": "classify"}]}),
    ]
    with pastina.Client("http://127.0.0.1:1") as client:
        client._client = httpx.Client(
            base_url="http://x", transport=httpx.MockTransport(lambda request: replies.pop(0))
        )
        if slept is None:
            with pytest.raises(ServerError) as caught:
                client.predict("x", ["saw"])
            assert (caught.value.status, pauses) == (status, [])
        else:
            assert len(client.predict("x", ["saw"])) == 1
            assert slept <= pauses[0] <= 1.25 * slept

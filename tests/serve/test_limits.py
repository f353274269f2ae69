"""More requests than a server takes, more than a token may ask, and requests that its end cuts off."""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import pastina
from pastina.client import ServerError
from pastina.serve.run import _PROBES
from tests.serving import ACME, ADMIN, SLOW, Running, running, wait_until, write_tokens

pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])
LIMIT = 4
PATH = "/v1/tasks/acme/topics/predict"


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server that takes few requests at once."""
    place = tmp_path_factory.mktemp("limits")
    options = ("--tokens", str(write_tokens(place / "tokens.toml")), "--default-task", "acme/many")
    few = ("--set", f"connections={LIMIT}", "--precision", "fp32")
    with running(folder, place / "log", *options, *few) as server:
        yield server


@pytest.fixture
def paused(server: Running) -> Iterator[int]:
    """The process of its engine, which does nothing meanwhile."""
    engine = server.engine()
    os.kill(engine, signal.SIGSTOP)
    yield engine
    os.kill(engine, signal.SIGCONT)


def ask(server: Running, inputs: Any = "saw", token: str = ADMIN) -> httpx.Response:
    with server.client(token) as client:
        return client.post(PATH, json={"inputs": inputs})


def connect(server: Running, sent: bytes = b"") -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    client = socket.create_connection((host, int(port)), 30)
    client.sendall(sent)
    return client


def counted(server: Running, name: str) -> float:
    with server.client(ADMIN) as client:
        lines = client.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


def test_one_request_too_many(server: Running, paused: int) -> None:
    """As many as the setting says are taken; the next one hears why not, and probes are answered."""
    answers: list[int] = []
    threads = [
        threading.Thread(target=lambda: answers.append(ask(server).status_code))
        for _ in range(LIMIT)
    ]
    for thread in threads:
        thread.start()
    with server.client(ADMIN) as client:
        wait_until(lambda: counted(server, "pastina_waiting_texts") == LIMIT)
        response = client.post(PATH, json={"inputs": "saw"})
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (503, "busy")
        assert "4 requests are under way" in error["message"]
        assert response.headers["retry-after"] == "1"
        assert error["request_id"] == response.headers["x-request-id"]
        other = client.post("/predict", json={"inputs": "saw"})
        assert (other.status_code, other.json()["error_type"]) == (503, "Unhealthy")
        for path in ("/healthz", "/readyz"):
            assert client.get(path).status_code == 200
    with (
        pastina.Client(server.url, ADMIN, retries=0) as own,
        pytest.raises(ServerError, match="under way") as caught,
    ):
        own.predict("acme/topics", ["saw"])
    assert caught.value.code == "busy"
    assert counted(server, 'pastina_rejected_total{reason="busy"}') == 3
    (line,) = [x for x in server.lines("request") if x["request_id"] == error["request_id"]]
    assert (line["status"], line["refused"]) == (503, "busy")
    os.kill(paused, signal.SIGCONT)
    for thread in threads:
        thread.join()
    assert answers == [200] * LIMIT


def test_connections_that_do_nothing(server: Running) -> None:
    """Whoever opens many and says nothing, or half of something, keeps nobody else out."""
    head = b"GET /healthz HTTP/1.1\r\nHost: x\r\n"
    sent = (b"", head, head + b"\r\n")
    many = [connect(server, sent[i % 3]) for i in range(3 * (LIMIT + _PROBES))]
    try:
        for _ in range(3):
            assert ask(server).status_code == 200
            assert httpx.get(f"{server.url}/healthz").status_code == 200
        assert counted(server, 'pastina_lost_connections_total{which="idle"}') > LIMIT + _PROBES
        assert counted(server, 'pastina_lost_connections_total{which="new"}') == 0
    finally:
        for one in many:
            one.close()


def test_guessing_names_counts(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each item is a text, whether there is such a task or not."""
    items = [{"task": f"acme/guess{i}", "inputs": "saw"} for i in range(99)]
    items.append({"task": "acme/topics", "inputs": "saw"})
    with server.client(SLOW) as client:
        first = client.post("/v1/predict", json={"items": items})
        assert (first.status_code, first.json()["answers"][-1]["kind"]) == (200, "classify")
        second = client.post("/v1/predict", json={"items": items})
        assert second.status_code == 429
        # of a burst of 4 texts there are 96 too few, and 4 are needed again, at half a text a second
        assert 190 < int(second.headers["retry-after"]) <= 200
        assert "more in " in second.json()["error"]["message"]
    monkeypatch.setattr(pastina.client, "_LONGEST", 100.0)
    with (
        pastina.Client(server.url, SLOW) as own,
        pytest.raises(ServerError, match="more in 19"),
    ):
        own.predict("acme/topics", ["saw"])


def test_metrics_are_for_those_who_may_see_all_tasks(server: Running) -> None:
    with server.client(ACME) as client:
        assert client.get("/metrics").status_code == 403


def test_the_end_cuts_off(folder: Path, tmp_path: Path) -> None:
    """Whoever waits when the time is over hears so, in JSON; the log has no traceback. Its default task
    cannot answer what text-embeddings-inference would, and says so."""
    responses: list[httpx.Response] = []
    options = ("--set", "stop_s=1", "--precision", "fp32", "--default-task", "acme/spans")
    with running(folder, tmp_path / "log", *options) as server:
        with server.client() as client:
            spans = client.post("/predict", json={"inputs": "saw"})
        assert (spans.status_code, spans.json()["error_type"]) == (422, "Validation")
        assert "'acme/spans' finds spans" in spans.json()["error"]
        with connect(server, b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\n") as slow:
            slow.sendall(b"Content-Length: 9\r\n\r\n")
            engine = server.engine()
            os.kill(engine, signal.SIGSTOP)
            thread = threading.Thread(target=lambda: responses.append(ask(server)))
            thread.start()
            time.sleep(0.3)
            server.process.terminate()
            thread.join()
            assert slow.recv(10_000).startswith(b"HTTP/1.1 503")
        assert server.process.wait(30) == 0
    (response,) = responses
    assert (response.status_code, response.json()["error"]["code"]) == (503, "stopping")
    assert int(response.headers["retry-after"]) >= 1
    cut = [line for line in server.lines("request") if line.get("refused") == "stopping"]
    assert [line["status"] for line in cut] == [503, 503]
    assert not [line for line in server.lines() if "where" in line]

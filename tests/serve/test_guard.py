"""Clients that send or read too slowly, or send a head without end: their connections are closed."""

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn

from pastina.serve import guard
from pastina.serve.guard import guarded_protocol
from pastina.serve.joined import Joined
from tests.serving import wait_until

pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])
LARGE = 50_000_000  # bytes that no system takes for a client that does not read


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answers without reading what it is sent."""
    assert scope["type"] == "http"
    body = b"x" * (LARGE if scope["path"] == "/large" else 2)
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(guard, "HEAD_S", 0.5)
    monkeypatch.setattr(guard, "WRITE_S", 0.5)
    protocol = guarded_protocol(read_s=1.0)
    protocol.body_s = 0.5
    config = uvicorn.Config(
        app, http=protocol, ws="none", lifespan="off", log_config=None, access_log=False
    )
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(config)
        run = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        run.start()
        wait_until(lambda: server.started)
        yield listener.getsockname()[1]
        server.should_exit = server.force_exit = True
        run.join()
        assert not server.server_state.connections


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), 30)


def seconds_until_closed(client: socket.socket, dribble: bytes = b"") -> float:
    """How long it takes until the server hangs up on somebody who sends this byte by byte."""
    client.settimeout(0.05)
    started = time.monotonic()
    while time.monotonic() - started < 20:
        try:
            if dribble:
                client.sendall(dribble)
            if not client.recv(1 << 20):
                return time.monotonic() - started
        except TimeoutError:
            continue
        except OSError:
            return time.monotonic() - started
    raise AssertionError("it is still open")


@pytest.mark.parametrize(
    ("first", "dribble"),
    [
        (b"", b""),
        (b"G", b""),
        (b"GET / HTTP/1.1\r\nHost: x\r\nA: ", b"a"),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n", b"a"),
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\nGET / HTTP/1.1\r\nA:", b"a"),
    ],
)
def test_byte_by_byte(port: int, first: bytes, dribble: bytes) -> None:
    with connect(port) as client:
        client.sendall(first)
        assert 0.2 < seconds_until_closed(client, dribble) < 10


@pytest.mark.parametrize("more", [b"a" * 1000, b"A: b\r\n" * 200])
def test_a_head_without_end(port: int, more: bytes) -> None:
    with connect(port) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nA: ")
        sent = 0
        try:
            while sent < LARGE:
                client.sendall(more)
                sent += len(more)
            raise AssertionError("all of it was taken")
        except OSError:  # it hung up
            pass
    with connect(port) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nA: " + more * (70_000 // len(more)))
        assert client.recv(100).startswith(b"HTTP/1.1 431")


@pytest.mark.parametrize("more", [b"", b"Connection: close\r\n"])
def test_who_does_not_read(port: int, more: bytes) -> None:
    with connect(port) as client:
        client.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\n" + more + b"\r\n")
        time.sleep(2.0)
        size = 0
        try:
            while part := client.recv(1 << 20):
                size += len(part)
        except OSError:
            pass
        assert size < LARGE


def test_a_reader_who_takes_turns(port: int) -> None:
    """Whoever goes on reading gets all of it; a good client keeps its connection."""
    with connect(port) as client:
        for _ in range(2):
            client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert client.recv(1000).endswith(b"\r\n\r\nxx"), "head and body come together"
            time.sleep(1.0)
        client.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        size = 0
        while part := client.recv(4_000_000):
            size += len(part)
            time.sleep(0.05)
        assert size > LARGE


@pytest.mark.parametrize("verb", ["HEAD", "GET"])
def test_a_head_alone(port: int, verb: str) -> None:
    with connect(port) as client:
        request = f"{verb} / HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n\r\n"
        client.sendall(request.encode())
        assert client.recv(1000).startswith(b"HTTP/1.1 200")


def test_joined() -> None:
    class Transport:
        def __init__(self) -> None:
            self.written: list[bytes] = []
            self.closed = False

        def write(self, data: bytes) -> None:
            self.written.append(data)

        def close(self) -> None:
            self.closed = True

    transport = Transport()
    joined = Joined(transport)
    joined.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    joined.write(b"HTTP/1.1 200 OK\r\n\r\n")
    assert transport.written == [b"HTTP/1.1 100 Continue\r\n\r\n"]
    joined.write(b"ab")
    joined.write(b"c")
    joined.write(b"HTTP/1.1 404 x\r\n\r\n")
    joined.flush()
    joined.flush()
    joined.write(b"HTTP/1.1 500 x\r\n\r\n")
    joined.close()
    assert transport.written[1:] == [
        b"HTTP/1.1 200 OK\r\n\r\nab",
        b"c",
        b"HTTP/1.1 404 x\r\n\r\n",
        b"HTTP/1.1 500 x\r\n\r\n",
    ]
    assert transport.closed

"""Clients that send or read too slowly, or send a head without end: their connections are closed."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import uvicorn

from pastina.serve import guard
from pastina.serve.connections import Places
from pastina.serve.guard import guarded_protocol
from pastina.serve.joined import Joined
from tests.serving import wait_until

pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])
PLACES = 8  # connections at once
LARGE = 50_000_000  # bytes that no system takes for a client that does not read


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answers without reading what it is sent."""
    assert scope["type"] == "http"
    if scope["path"] == "/slow":
        await asyncio.sleep(1.0)
    body = b"x" * (LARGE if scope["path"] == "/large" else 2)
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(guard, "HEAD_S", 0.5)
    monkeypatch.setattr(guard, "WRITE_S", 0.5)
    protocol = guarded_protocol(1.0, Places(PLACES))
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


GET, END = b"GET / HTTP/1.1\r\nHost: x\r\n", b"\r\n\r\n"
HEADERS = b"".join(b"A%d: %s\r\n" % (i, b"a" * 90) for i in range(600))


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (GET + b"A: " + b"a" * (guard.MAX_HEAD - len(GET + b"A: " + END)) + END, 200),
        (GET + b"A: " + b"a" * (guard.MAX_HEAD - len(GET + b"A: " + END) + 1) + END, 431),
        (GET + b"A: " + b"a" * 70_000 + END, 431),
        (GET + HEADERS + b"\r\n", 200),
        (GET + HEADERS + b"A: " + b"a" * 10_000 + END, 431),
        (b"GET /" + b"a" * 66_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\n: \x00\r\n\r\n", 400),
    ],
)
def test_how_long_a_head_may_be(port: int, head: bytes, status: int) -> None:
    """However it comes: in one piece or in two, alone or behind others."""
    post = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 60000\r\n\r\n" + b"a" * 60_000
    for first, cut in ((b"", 0), (b"", 30_000), (GET + b"\r\n", 0), (post, 0)):
        with connect(port) as client:
            for part in filter(None, (first, head[:cut])):
                client.sendall(part)
                time.sleep(0.05)
            client.sendall(head[cut:])
            found = b""
            while b"HTTP/1.1 %d" % status not in found:
                part = client.recv(1000)
                assert part, (first[:20], cut, found)
                found += part


def test_many_heads_at_once(port: int) -> None:
    """Together they may be longer than one of them may."""
    with connect(port) as client:
        client.sendall((GET + b"A: " + b"a" * 3000 + END) * 50 + GET)
        client.sendall(b"\r\n")
        found = b""
        while found.count(b"HTTP/1.1 200") < 51:
            part = client.recv(1 << 20)
            assert part
            found += part
        assert b"431" not in found


@pytest.mark.parametrize(("count", "is_answered"), [(guard.MOST_BEHIND, True), (5000, False)])
def test_how_many_requests_may_wait_behind_one(port: int, count: int, is_answered: bool) -> None:
    """Each takes memory, though nobody reads an answer."""
    slow = b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n"
    with connect(port) as client:
        client.sendall(slow + (GET + b"\r\n") * count)
        found = b""
        try:
            while found.count(b"HTTP/1.1 200") <= count and (part := client.recv(1 << 20)):
                found += part
        except ConnectionResetError:
            pass
        assert found.count(b"HTTP/1.1 200") == (count + 1 if is_answered else 0)


def test_who_has_nothing_to_do_makes_room(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that said nothing for longest goes first; whoever waits for an answer stays."""
    monkeypatch.setattr(guard, "HEAD_S", 30.0)
    with ExitStack() as stack:

        def more(count: int) -> list[socket.socket]:
            return [stack.enter_context(connect(port)) for _ in range(count)]

        (busy,) = more(1)
        busy.sendall(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n")
        silent = more(PLACES - 1)
        for one in (silent[-1], silent[0]):  # the last one first: then all of them were taken in
            one.sendall(GET + b"\r\n")
            assert one.recv(1000).endswith(b"xx")
        new = more(PLACES - 2)
        assert [one.recv(10) for one in silent[1:]] == [b""] * (PLACES - 2)
        for one in (silent[0], *new):
            one.sendall(GET + b"\r\n")
            assert one.recv(1000).endswith(b"xx")
        assert busy.recv(1000).endswith(b"xx")


def test_places() -> None:
    lost: list[str] = []

    class Connection:
        def give_way(self) -> None:
            gone.append(self)

    gone: list[Connection] = []
    places = Places(2, lost.append)
    one, two, three, four = (Connection() for _ in range(4))
    assert places.enter(one)
    assert places.enter(two)
    places.see(one, is_idle=False)
    places.see(one, is_idle=True)
    assert places.enter(three)
    assert gone == [two], "the other one had something to do later"
    places.leave(two)
    for connection in (one, three):
        places.see(connection, is_idle=False)
    assert not places.enter(four)
    places.leave(one)
    places.see(one, is_idle=True)
    assert places.enter(four)
    assert (gone, lost) == ([two], ["idle", "new"])


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

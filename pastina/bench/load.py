"""Load on a server from a process of its own: `python -m pastina.bench.load` with orders on stdin.

As little work a request as can be, for it runs on the machine that it measures: plain sockets, requests
made beforehand, of the answers only what is asked for.
"""

import asyncio
import json
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pastina.errors import PastinaError

_LATE = 30.0  # seconds after the end that the last answers are waited for


@dataclass(frozen=True, slots=True)
class Orders:
    """What to send. requests: pairs of a path and a body, drawn at random.

    rate: requests a second, at random moments; None: each connection sends as soon as it has an
    answer. truth: for each request the digest and the scores by label that are right, each of several;
    None: answers are not looked at.
    """

    port: int
    requests: Sequence[tuple[str, str]]
    connections: int
    seconds: float
    rate: float | None = None
    seed: int = 0
    token: str | None = None
    truth: Sequence[Mapping[str, Mapping[str, float]]] | None = None
    tolerance: float = 1e-3


@dataclass(slots=True)
class Found:
    """What came back. latencies: seconds, from when a request was due; of answers with 200 only."""

    num_sent: int = 0
    seconds: float = 0.0
    statuses: dict[str, int] = field(default_factory=dict)
    latencies: list[float] = field(default_factory=list)
    wrong: int = 0
    wrong_ones: list[str] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Answers a second."""
        return len(self.latencies) / self.seconds


def run_load(orders: Orders) -> Found:
    """What a new process finds.

    Raises:
        PastinaError: it failed.
    """
    command = [sys.executable, "-m", __name__]
    done = subprocess.run(command, input=json.dumps(asdict(orders)), capture_output=True, text=True)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["without a word"])[-1]
        raise PastinaError(f"The process that makes load failed: {last}")
    return Found(**json.loads(done.stdout))


class _Connection(asyncio.Protocol):
    """One connection: a request, its answer, the next request."""

    def __init__(self) -> None:
        self.buffer = b""
        self.answer: asyncio.Future[tuple[int, bytes]] | None = None
        self.transport: Any = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def send(self, request: bytes) -> "asyncio.Future[tuple[int, bytes]]":
        self.answer = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return self.answer

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, mark, rest = self.buffer.partition(b"\r\n\r\n")
        if not mark:
            return
        at = head.lower().find(b"content-length:")
        size = int(head[at + 15 :].partition(b"\r\n")[0]) if at >= 0 else 0
        if len(rest) >= size and self.answer is not None and not self.answer.done():
            self.buffer = rest[size:]
            self.answer.set_result((int(head[9:12]), rest[:size]))

    def connection_lost(self, exc: Exception | None) -> None:
        if self.answer is not None and not self.answer.done():
            self.answer.set_result((0, b""))


class _Load:
    """A run of load."""

    def __init__(self, orders: Orders) -> None:
        self.orders, self.found = orders, Found()
        self.statuses: Counter[int] = Counter()
        self.draw = random.Random(orders.seed)
        token = f"Authorization: Bearer {orders.token}\r\n" if orders.token else ""
        self.bytes = []
        for path, body in orders.requests:
            content = body.encode()
            head = (
                f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{token}"
                f"Content-Type: application/json\r\nContent-Length: {len(content)}"
            )
            self.bytes.append(head.encode() + b"\r\n\r\n" + content)

    async def connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(_Connection, "127.0.0.1", self.orders.port)
        return connection

    async def run(self) -> Found:
        connections = [await self.connect() for _ in range(self.orders.connections)]
        started = time.perf_counter()
        self.stop = started + self.orders.seconds
        work = self.closed if self.orders.rate is None else self.open
        await work(connections)
        self.found.seconds = max(time.perf_counter() - started, self.orders.seconds)
        self.found.statuses = {str(status): count for status, count in self.statuses.items()}
        for connection in connections:
            connection.transport.close()
        return self.found

    async def closed(self, connections: list[_Connection]) -> None:
        async def one(connection: _Connection) -> None:
            while (due := time.perf_counter()) < self.stop:
                if await self.ask(connection, due) == 0:  # it hung up
                    connection = await self.connect()

        await asyncio.gather(*(one(connection) for connection in connections))

    async def open(self, connections: list[_Connection]) -> None:
        """Requests at random moments; one that finds no free connection waits, and that counts."""
        free: asyncio.Queue[_Connection] = asyncio.Queue()
        for connection in connections:
            free.put_nowait(connection)

        async def one(due: float) -> None:
            connection = await free.get()
            if await self.ask(connection, due) == 0:
                connection = await self.connect()
            free.put_nowait(connection)

        assert self.orders.rate is not None
        under_way, due = set[Any](), time.perf_counter()
        while due < self.stop:
            due += self.draw.expovariate(self.orders.rate)
            if (pause := due - time.perf_counter()) > 0:
                await asyncio.sleep(pause)
            task = asyncio.create_task(one(due))
            under_way.add(task)
            task.add_done_callback(under_way.discard)
        if under_way:
            await asyncio.wait(under_way, timeout=_LATE)

    async def ask(self, connection: _Connection, due: float) -> int:
        """Send one of the requests; the status of the answer, 0 if there was none."""
        number = self.draw.randrange(len(self.bytes))
        self.found.num_sent += 1
        status, body = await connection.send(self.bytes[number])
        self.statuses[status] += 1
        if status == 200:
            self.found.latencies.append(time.perf_counter() - due)
            if self.orders.truth is not None:
                self.check(number, body)
        return status

    def check(self, number: int, body: bytes) -> None:
        """Count the answer if it is not that of one version, the one that it names."""
        (answer,) = json.loads(body)["answers"]
        assert self.orders.truth is not None
        scores = {one["label"]: one["score"] for one in answer["scores"]}
        right = self.orders.truth[number].get(answer["digest"])
        if right is not None and set(right) == set(scores):
            worst = max(abs(right[label] - score) for label, score in scores.items())
            if worst <= self.orders.tolerance:
                return
        self.found.wrong += 1
        if len(self.found.wrong_ones) < 3:
            self.found.wrong_ones.append(body.decode()[:500])


def main() -> None:
    """Make the load, and print what came back."""
    orders = Orders(**json.load(sys.stdin))
    try:
        from uvloop import new_event_loop
    except ImportError:
        new_event_loop = asyncio.new_event_loop
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        found = runner.run(_Load(orders).run())
    json.dump(asdict(found), sys.stdout)


if __name__ == "__main__":
    main()

"""A server in a process of its own to be measured, and the bare engine in another."""

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pastina.errors import PastinaError

_LONGEST = 900.0  # seconds that a start may take


@dataclass(frozen=True)
class Served:
    """A server that is ready."""

    process: "subprocess.Popen[bytes]"
    port: int
    log: Path

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"

    def lines(self, event: str) -> list[dict[str, Any]]:
        """What it logged of this event."""
        whole = self.log.read_text().rpartition("\n")[0]  # it may be writing just now
        found = [json.loads(line) for line in whole.splitlines() if line[:1] == "{"]
        return [line for line in found if line.get("event") == event]

    def memory(self) -> float:
        """MB that its processes hold."""
        import psutil

        own = psutil.Process(self.process.pid)
        parts = [own, *own.children(recursive=True)]
        return sum(part.memory_full_info().pss for part in parts) / 1e6

    def get(self, path: str, token: str | None = None) -> tuple[int, str]:
        """Status and body."""
        return call("GET", f"{self.url}{path}", token=token)


def call(
    method: str, url: str, content: bytes | None = None, token: str | None = None
) -> tuple[int, str]:
    """Status and body of a request; 0 where there is no answer."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(url, content, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(errors="replace")
    except OSError:
        return 0, ""


@contextmanager
def served(folder: Path, scratch: Path, *options: str) -> Iterator[Served]:
    """`pastina serve` on this folder, ready; ended afterwards.

    Raises:
        PastinaError: it does not start.
    """
    log = scratch / f"server-{time.monotonic_ns()}.log"
    command = [sys.executable, "-m", "pastina.cli", "serve", str(folder), "--port", "0", *options]
    with _process(command, log) as process:
        port = 0
        started = time.monotonic()
        while True:
            server = Served(process, port, log)
            lines = server.lines("listening")
            if not port and lines:
                port = int(lines[0]["url"].rpartition(":")[2])
            elif port and server.get("/readyz")[0] == 200:
                break
            if process.poll() is not None or time.monotonic() - started > _LONGEST:
                last = (log.read_text().strip().splitlines() or ["without a word"])[-1]
                raise PastinaError(f"The server does not start: {last}")
            time.sleep(0.02)
        yield server


@contextmanager
def _process(command: Sequence[str], log: Path) -> Iterator["subprocess.Popen[bytes]"]:
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Bare:
    """The engine without a server, in a process that answers a line of orders with a line of JSON."""

    def __init__(self, folder: Path, precision: str = "auto") -> None:
        command = [sys.executable, "-m", __name__, str(folder), precision]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=dict(os.environ)
        )

    def ask(self, **orders: Any) -> Any:
        """See `_bare`."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(orders) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise PastinaError("The process with the bare engine ended.")
        return json.loads(line)

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def _bare(tasks: Any, orders: Mapping[str, Any]) -> Any:
    """What an order asks for.

    rate: texts a second in batches of so many rows.
    bare_forward: seconds for one text, the backbone alone as transformers runs it, in fp32.
    engine_forward: the same by the engine, in its precision.
    truth: the scores by digest of each (task, text). add: the digest of a task that is added.
    """
    import random

    match orders["verb"]:
        case "rate":
            draw, count = random.Random(orders["seed"]), 0
            started = time.perf_counter()
            while time.perf_counter() - started < orders["seconds"]:
                batch = [
                    (draw.choice(orders["tasks"]), draw.choice(orders["texts"]))
                    for _ in range(orders["rows"])
                ]
                tasks.predict(batch)
                count += len(batch)
            return count / (time.perf_counter() - started)
        case "engine_forward":
            from pastina.data.rows import Row

            task, engine = tasks.bank[orders["task"]], tasks.engine
            examples = [tasks.encode([task], [Row(text)])[0][0] for text in orders["texts"]]
            return _second_time(lambda example: engine.logits([example], [task]), examples)
        case "bare_forward":
            model, tokenizer = _plain(orders["backbone"])
            inputs = [tokenizer(text, return_tensors="pt") for text in orders["texts"]]
            return _second_time(lambda one: model(**one), inputs)
        case "truth":
            answers = tasks.predict([tuple(pair) for pair in orders["pairs"]])
            digests = [tasks.bank[name].digest for name, _ in orders["pairs"]]
            return [{d: a.scores} for d, a in zip(digests, answers, strict=True)]
        case "add":
            return tasks.add(orders["folder"], orders["name"]).digest


def _second_time(call: Callable[[Any], object], inputs: Sequence[Any]) -> float:
    """Seconds that a call takes the second time, median over the inputs."""
    import torch

    seconds = []
    with torch.inference_mode():
        for one in inputs:
            call(one)
            started = time.perf_counter()
            call(one)
            seconds.append(time.perf_counter() - started)
    return sorted(seconds)[len(seconds) // 2]


@cache
def _plain(folder: str) -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer

    return AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def main() -> None:
    """Load, then follow orders until there are no more."""
    from pastina.adapter import list_adapters
    from pastina.tasks import Tasks

    folder = Path(sys.argv[1])
    found = list(list_adapters(folder))
    card: Any = found[0][1]
    tasks = Tasks(card.backbone.name, precision=sys.argv[2])  # type: ignore[arg-type]
    for path, _ in found:
        tasks.add(path, path.relative_to(folder).as_posix())
    for line in sys.stdin:
        print(json.dumps(_bare(tasks, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()

"""A server in a process of its own, as `pastina serve` starts it, and what is sent to it."""

import io
import json
import os
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

TIMEOUT = 120
ADMIN, ACME, GLOBEX, SLOW = "admin-token", "acme-token", "globex-token", "slow-token"


@dataclass
class Running:
    """A server that listens. log: where its lines go."""

    process: "subprocess.Popen[bytes]"
    url: str
    log: Path

    def lines(self, event: str = "") -> list[dict[str, Any]]:
        """What it logged so far; event: lines of this event only."""
        found = [json.loads(line) for line in self.log.read_text().splitlines()]
        return [line for line in found if event in ("", line["event"])]

    def client(self, token: str | None = None, **options: Any) -> httpx.Client:
        """A client of it."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60, **options)

    def engine(self) -> int:
        """The process of its engine."""
        import psutil

        children = psutil.Process(self.process.pid).children(recursive=True)
        (found,) = [child.pid for child in children if "pastina.serve.process" in child.cmdline()]
        return found


@contextmanager
def running(
    folder: Path | str, log: Path, *options: str, is_ready: bool = True
) -> Iterator[Running]:
    """`pastina serve FOLDER` with these options on a free port, ended afterwards."""
    command = [sys.executable, "-m", "pastina.cli", "serve", str(folder), "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*command, *options], stderr=file, stdout=subprocess.DEVNULL, env=environment
        )
    server = Running(process, "", log)
    try:
        wait_until(lambda: bool(listening(server)) or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        server.url = listening(server)[0]["url"]
        if is_ready:
            with server.client() as client:
                wait_until(lambda: client.get("/readyz").status_code == 200)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise


def listening(server: Running) -> list[dict[str, Any]]:
    try:
        return server.lines("listening")
    except json.JSONDecodeError:  # in the middle of a line
        return []


def wait_until(is_so: Callable[[], bool], seconds: float = TIMEOUT) -> None:
    """Wait until this is so."""
    stop = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < stop, "it does not happen"
        time.sleep(0.02)


def files_of(folder: Path) -> dict[str, bytes]:
    """The files of an adapter."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def zipped(files: Mapping[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    """These files as a zip."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()


def tarred(files: Mapping[str, bytes], mode: str = "w:gz", *more: tarfile.TarInfo) -> bytes:
    """These files as a tar; more: members without content, such as links."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:  # pyright: ignore
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for info in more:
            archive.addfile(info)
    return out.getvalue()


def write_tokens(path: Path) -> Path:
    """A file with four tokens."""
    import hashlib

    def digest(token: str) -> str:
        return hashlib.sha256(token.encode()).hexdigest()

    path.write_text(f"""
[[token]]
name = "admin"
sha256 = "{digest(ADMIN)}"
tasks = ["*"]
admin = true

[[token]]
name = "acme"
sha256 = "{digest(ACME)}"
tasks = ["acme/*", "public"]

[[token]]
name = "globex"
sha256 = "{digest(GLOBEX)}"
tasks = ["globex/*"]

[[token]]
name = "slow"
sha256 = "{digest(SLOW)}"
tasks = ["*"]
rate = 0.5
burst = 4
""")
    return path


def install_for_ever(root: Path, versions: list[dict[str, bytes]]) -> None:
    """Write adapters into a folder until somebody kills this process."""
    from pastina.serve.store import FolderStore

    store, number = FolderStore(root), 0
    (root / ".began").touch()
    while True:
        store.install("acme/x", versions[number % 2])
        store.install(f"new{number % 5}", versions[number % 2])
        if number % 3 == 2:
            store.remove(f"new{number % 5}")
        number += 1

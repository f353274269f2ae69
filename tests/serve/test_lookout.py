"""The process that looks at the folder: it tells what changed, and nothing is missed when it dies."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from pastina.adapter import CARD, CONFIG, WEIGHTS
from pastina.serve.lookout import Lookout
from pastina.serve.registry import Registry
from pastina.serve.store import FolderStore
from pastina.tasks import Tasks
from tests.serving import files_of, wait_until

Make = Callable[..., Path]
POLL = 0.05  # seconds


@pytest.fixture(scope="module")
def versions(make: Make, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, bytes]]:
    """The files of two adapters."""
    root = tmp_path_factory.mktemp("versions")
    return [files_of(make(root / f"{seed}", seed=seed, name="x")) for seed in (31, 32)]


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    (tmp_path / "adapters").mkdir()
    return FolderStore(tmp_path / "adapters")


def next_of(lookout: Lookout) -> tuple[str, dict[str, Any]]:
    """What it says next, without the time."""
    stop = time.monotonic() + 60
    while time.monotonic() < stop:
        if heard := lookout.hear(1.0):
            ((what, started, found),) = heard
            assert 0 <= time.monotonic() - started < 60
            assert isinstance(found, dict)
            return what, found
    raise AssertionError("it says nothing")


def test_it_tells_everything_once_and_then_what_changes(
    store: FolderStore,
    versions: list[dict[str, bytes]],
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONWARNINGS", "default")
    for name in ("a", "acme/b"):
        store.install(name, versions[0])
    with closing(Lookout(str(store.root), POLL)) as lookout:
        assert next_of(lookout) == ("all", {name: store.find(name) for name in ("a", "acme/b")})
        assert lookout.hear(10 * POLL) == [], "nothing changed"
        store.install("a", versions[1])
        assert next_of(lookout) == ("changed", {"a": store.find("a")})
        store.remove("acme/b")
        assert next_of(lookout) == ("changed", {"acme/b": None})
        assert lookout.process is not None
        lookout.process.kill()
        store.install("c", versions[0])
        assert next_of(lookout) == ("all", {name: store.find(name) for name in ("a", "c")})
        (record,) = [r for r in caplog.records if r.getMessage() == "the lookout died"]
        assert record.__dict__["status"] == -signal.SIGKILL
        os.kill(lookout.process.pid, signal.SIGTERM)  # as systemd does to all that belong to a unit
        assert lookout.hear(4 * POLL) == []
        store.root.rename(store.root.with_name("away"))
        what, _, reason = lookout.hear(60)[0]
        assert (what, "FileNotFoundError" in str(reason)) == ("failed", True)
    assert lookout.process.returncode == 0
    with closing(Lookout(str(store.root), POLL)) as lookout:  # it begins, and there is no folder
        assert "There is no folder" in str(lookout.hear(60)[0][2])
        store.root.with_name("away").rename(store.root)
        heard = lookout.hear(60)
        while heard[-1][0] == "failed":
            heard = lookout.hear(60)
        assert heard[-1][2] == {name: store.find(name) for name in ("a", "c")}
    assert capfd.readouterr().err == ""


def test_it_ends_with_the_process_that_asked(store: FolderStore, tmp_path: Path) -> None:
    code = (
        "import sys, time; from pastina.serve.lookout import Lookout;"
        "lookout = Lookout(sys.argv[1], 0.05);"
        "lookout.hear(60); print(lookout.process.pid, flush=True); time.sleep(60)"
    )
    asking = subprocess.Popen(
        [sys.executable, "-c", code, str(store.root)], stdout=subprocess.PIPE, text=True
    )
    with asking:
        assert asking.stdout is not None
        number = int(asking.stdout.readline())
        command = Path(f"/proc/{number}/cmdline")
        assert b"pastina.serve.lookout" in command.read_bytes()
        asking.kill()
    wait_until(lambda: not command.exists() or not command.read_bytes())


@contextmanager
def kept(store: FolderStore, bert: Path) -> Iterator[tuple[Registry, dict[str, Any]]]:
    """A registry that hears a lookout, and what it told, as long as this lasts."""
    told: dict[str, Any] = {}
    registry = Registry(store, Tasks(str(bert), precision="fp32").bank, told.update)
    assert registry.scan()
    is_over = threading.Event()
    with closing(Lookout(str(store.root), POLL)) as lookout:
        thread = threading.Thread(target=registry.run, args=(lookout, POLL, is_over))
        thread.start()
        try:
            yield registry, told
        finally:
            is_over.set()
            thread.join()


def test_what_comes_changes_breaks_and_goes(
    store: FolderStore, versions: list[dict[str, bytes]], bert: Path
) -> None:
    store.install("a", versions[0])
    with kept(store, bert) as (registry, told):
        first = told["a"]["digest"]
        store.install("a", versions[1])
        wait_until(lambda: told["a"]["digest"] != first)
        (store.root / "a" / CARD).unlink()
        wait_until(lambda: told["a"] is None)
        # as cp writes them, the card first: refused, and mended without a change of the card
        (store.root / "b").mkdir()
        (store.root / "b" / CARD).write_bytes(versions[0][CARD])
        (store.root / "b" / CONFIG).write_bytes(versions[0][CONFIG])
        wait_until(lambda: "b" in told)
        assert "is missing" in told["b"]["refused"]
        (store.root / "b" / WEIGHTS).write_bytes(versions[0][WEIGHTS])
        wait_until(lambda: told["b"]["refused"] is None)
        os.mkdir(os.fsencode(store.root) + b"/\xff")  # noqa: PTH102  # no path of pathlib's
        for file in (CARD, CONFIG, WEIGHTS):
            Path(os.fsdecode(os.fsencode(store.root) + b"/\xff"), file).write_bytes(b"x")
        wait_until(lambda: "\\udcff" in told)
        time.sleep(4 * POLL)
        assert "cannot name a task" in told["\\udcff"]["refused"]
        (store.root / "b" / WEIGHTS).write_bytes(b"x")
        (store.root / "b" / CARD).write_bytes(versions[1][CARD])
        wait_until(lambda: told["b"]["refused"] is not None)
        assert registry.bank["b"].digest == told["b"]["digest"] == first, "it goes on answering"
        assert registry.remove("b")
        assert told["b"] is None


def test_it_goes_on_whatever_happened(
    store: FolderStore,
    versions: list[dict[str, bytes]],
    bert: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    find, failures = FolderStore.find, [RuntimeError("out of the blue"), PermissionError("later")]

    def failing(self: FolderStore, name: str) -> Any:
        if failures:
            raise failures.pop()
        return find(self, name)

    hear, bugs = Lookout.hear, [ValueError("a bug of ours")]

    def failing_too(self: Lookout, seconds: float) -> Any:
        if bugs:
            raise bugs.pop()
        return hear(self, seconds)

    monkeypatch.setattr(Lookout, "hear", failing_too)
    with kept(store, bert) as (registry, told):
        # a look that began before our own change, so that the task is looked at again, which fails
        with registry._lock:
            registry.install("x", versions[0])
            monkeypatch.setattr(FolderStore, "find", failing)
            registry._changed["x"] = time.monotonic() + 1.0
            store.install("x", versions[1])
        new = FolderStore(store.root).read("x")[1]
        wait_until(lambda: told["x"]["digest"] == json.loads(new)["digest"])
    assert not failures
    assert not bugs
    said = {record.getMessage() for record in caplog.records}
    assert {"the task cannot be looked at", "a bug"} <= said


def test_a_look_from_before_a_change_of_ours_does_not_undo_it(
    store: FolderStore, versions: list[dict[str, bytes]], bert: Path
) -> None:
    told: dict[str, Any] = {}
    registry = Registry(store, Tasks(str(bert), precision="fp32").bank, told.update)
    before = time.monotonic()
    registry.install("a", versions[0])
    old = store.find("a")
    registry.remove("a")
    registry.install("a", versions[1])
    new = told["a"]["digest"]
    registry.hear("changed", before, {"a": None})
    assert (told["a"]["digest"], "a" in registry.bank) == (new, True)
    registry.look_again()
    assert told["a"]["digest"] == new
    registry.remove("a")
    registry.hear("changed", before, {"a": old})
    registry.look_again()
    assert (told["a"], "a" in registry.bank) == (None, False)
    # somebody else changed it after us, which the same look saw already, and no other will tell
    registry.install("a", versions[0])
    store.remove("a")
    registry.hear("changed", before, {"a": None})
    registry.look_again()
    assert (told["a"], "a" in registry.bank) == (None, False)
    registry.hear("changed", time.monotonic(), {"a": None})
    store.install("a", versions[1])
    registry.hear("changed", time.monotonic(), {"a": store.find("a")})
    assert told["a"]["digest"] == new


def test_what_is_out_of_reach_is_not_gone(
    store: FolderStore, versions: list[dict[str, bytes]], bert: Path
) -> None:
    """A refused task that answers, while the folder is away; one that a new lookout cannot see."""
    told: dict[str, Any] = {}
    registry = Registry(store, Tasks(str(bert), precision="fp32").bank, told.update)
    store.install("a", versions[0])
    store.install("b", versions[0])
    assert registry.scan()
    (store.root / "a" / WEIGHTS).write_bytes(b"x")
    (store.root / "a" / CARD).write_bytes(versions[1][CARD])
    assert registry.scan()
    assert told["a"]["refused"]
    away = store.root.rename(store.root.with_name("away"))
    registry.look_again()
    assert "a" in registry.bank, "it goes on answering"
    away.rename(store.root)
    registry.hear("all", time.monotonic(), {"a": store.find("a")})
    registry.look_again()
    assert told["b"] is not None, "it lies there"
    store.remove("b")
    registry.hear("all", time.monotonic(), {"a": store.find("a")})
    registry.look_again()
    assert (told["b"], "b" in registry.bank) == (None, False)
    store.install("x/y", versions[0])
    for file, content in versions[0].items():
        (store.root / "x" / file).write_bytes(content)
    assert store.find("x/y") is None, "another adapter hides it"


def test_what_could_not_be_told_is_told_again(
    store: FolderStore,
    versions: list[dict[str, bytes]],
    bert: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inner, bugs = Registry._load, [ValueError("a bug of ours")]

    def failing(self: Registry, *args: Any) -> Any:
        if bugs and "b" in args:
            raise bugs.pop()
        return inner(self, *args)

    hear, failures = Registry.hear, [ValueError("another")]

    def hears(self: Registry, what: str, *rest: Any) -> None:
        if failures and what == "changed" and threading.current_thread() is not here:
            raise failures.pop()
        hear(self, what, *rest)

    here = threading.current_thread()
    monkeypatch.setattr(Registry, "_load", failing)
    monkeypatch.setattr(Registry, "hear", hears)
    with kept(store, bert) as (_, told):
        time.sleep(4 * POLL)
        for name in "abc":
            store.install(name, versions[0])
        wait_until(lambda: set(told) == {"a", "b", "c"})
    assert not bugs
    assert not failures


def test_libraries_warn_in_lines_of_the_log(
    store: FolderStore,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os, logging, warnings; scandir = os.scandir\n"
        "def warns(*args):\n"
        "    logging.getLogger('s3fs').warning('slow'); warnings.warn('old'); return scandir(*args)\n"
        "os.scandir = warns\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with closing(Lookout(str(store.root), POLL)) as lookout:
        assert next_of(lookout) == ("all", {})
    lines = capfd.readouterr().err.splitlines()
    assert {json.loads(line)["event"] for line in lines} >= {"slow"}


def test_it_needs_no_torch() -> None:
    code = (
        "import sys, pastina.serve.lookout; print({'torch', 'numpy', 'fastapi'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"

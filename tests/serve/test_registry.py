"""The folder is the truth: what is there answers, what is broken says why, and stops nobody."""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest

from pastina.adapter import check_content
from pastina.bank import Bank
from pastina.errors import AdapterError, PastinaError
from pastina.files import CARD, CONFIG, WEIGHTS
from pastina.serve.names import MAX_PARTS, why_not_a_name
from pastina.serve.registry import Registry, choose_backbone
from pastina.serve.remote import RemoteStore
from pastina.serve.store import FolderStore, Store, open_store
from pastina.tasks import Tasks
from tests.adapter_folder import LONG, reseal
from tests.processes import _server
from tests.serving import files_of, install_for_ever, wait_until

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def versions(make: Make, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, bytes]]:
    """The files of three adapters."""
    root = tmp_path_factory.mktemp("versions")
    return [files_of(make(root / f"{seed}", seed=seed, name="x")) for seed in (21, 22, 23)]


@pytest.fixture
def tasks(bert: Path) -> Tasks:
    return Tasks(str(bert), precision="fp32")


class Watched:
    """A registry, and what it told."""

    def __init__(self, store: Store, tasks: Tasks | Bank) -> None:
        bank = tasks if isinstance(tasks, Bank) else tasks.bank
        self.told: dict[str, Any] = {}
        self.num_told = 0
        self.registry = Registry(store, bank, self.hear)

    def hear(self, changes: dict[str, Any]) -> None:
        assert changes
        self.num_told += 1
        for name, info in changes.items():
            if info is None:
                del self.told[name]
            else:
                self.told[name] = info

    def scan(self) -> dict[str, str | None]:
        """Each task's digest, or None where there is none."""
        assert self.registry.scan()
        return {name: info.get("digest") for name, info in sorted(self.told.items())}


@pytest.fixture(params=["folder", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty store: a folder, and one that fsspec keeps in memory."""
    if request.param == "folder":
        (tmp_path / "adapters").mkdir()
        return FolderStore(tmp_path / "adapters")
    fs: Any = fsspec.filesystem("memory")
    fs.makedirs(f"/{tmp_path.name}")
    return RemoteStore(fs, f"/{tmp_path.name}")


def digest(files: dict[str, bytes]) -> str:
    return check_content(Path("x"), files[CARD], files[WEIGHTS], files[CONFIG]).card.digest


def test_what_comes_changes_and_goes(
    store: Store, tasks: Tasks, versions: list[dict[str, bytes]]
) -> None:
    one, other, third = versions
    watched = Watched(store, tasks)
    assert watched.scan() == {}
    store.install("acme/x", one)
    store.install("y", other)
    assert watched.scan() == {"acme/x": digest(one), "y": digest(other)}
    num_told = watched.num_told
    watched.scan()
    assert watched.num_told == num_told, "nothing changed"
    store.install("acme/x", third)
    store.remove("y")
    assert watched.scan() == {"acme/x": digest(third)}
    assert [task.name for task in tasks] == ["acme/x"]
    assert tasks.bank["acme/x"].digest == digest(third)


def test_install_and_remove(
    store: Store, tasks: Tasks, versions: list[dict[str, bytes]], caplog: pytest.LogCaptureFixture
) -> None:
    watched = Watched(store, tasks)
    assert watched.registry.install("acme/x", versions[0])["is_new"] is True
    assert watched.registry.install("acme/x", versions[1])["is_new"] is False
    assert watched.told["acme/x"]["digest"] == digest(versions[1])
    assert tasks.predict([("acme/x", LONG)])
    num_told = watched.num_told
    watched.scan()
    assert watched.num_told == num_told, "a scan knows already what was installed"
    assert watched.registry.remove("acme/x") is True
    assert watched.registry.remove("acme/x") is False
    assert (len(tasks), watched.told) == (0, {})


def test_a_broken_one_is_refused_with_its_reason(
    store: Store, tasks: Tasks, versions: list[dict[str, bytes]], caplog: pytest.LogCaptureFixture
) -> None:
    watched = Watched(store, tasks)
    store.install("good", versions[0])
    store.install("bad", versions[1] | {WEIGHTS: b"x"})
    assert watched.scan() == {"bad": None, "good": digest(versions[0])}
    assert "was changed after it was written" in watched.told["bad"]["refused"]
    assert watched.told["good"]["refused"] is None
    (record,) = [r for r in caplog.records if r.getMessage() == "adapter refused"]
    assert record.__dict__["task"] == "bad"
    watched.scan()
    assert len([r for r in caplog.records if r.getMessage() == "adapter refused"]) == 1
    # a good version is replaced by a broken one: the good one goes on answering
    store.install("good", versions[0] | {CARD: b"{}"})
    assert watched.scan()["good"] == digest(versions[0])
    assert "not a task card" in watched.told["good"]["refused"]
    assert tasks.predict([("good", LONG)])
    # mended, though the card of the bad one did not change
    store.install("bad", versions[1])
    store.install("good", versions[2])
    assert watched.scan() == {"bad": digest(versions[1]), "good": digest(versions[2])}
    assert all(info["refused"] is None for info in watched.told.values())


def test_files_that_come_one_by_one(
    tasks: Tasks, versions: list[dict[str, bytes]], tmp_path: Path
) -> None:
    """As cp or rsync write them: the task answers when all are there, without a change of the card."""
    watched = Watched(FolderStore(tmp_path), tasks)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / CARD).write_bytes(versions[0][CARD])
    assert watched.scan() == {"x": None}
    (tmp_path / "x" / CONFIG).write_bytes(versions[0][CONFIG])
    (tmp_path / "x" / WEIGHTS).write_bytes(versions[0][WEIGHTS][:100])
    assert watched.scan() == {"x": None}
    (tmp_path / "x" / WEIGHTS).write_bytes(versions[0][WEIGHTS])
    assert watched.scan() == {"x": digest(versions[0])}


def test_what_does_not_fit_this_backbone(
    store: Store, tasks: Tasks, versions: list[dict[str, bytes]], make: Make, tmp_path: Path
) -> None:
    """Refused with the field that differs: another backbone, tokenizer, config, label set."""
    watched = Watched(store, tasks)
    store.install("good", versions[0])
    source = make(tmp_path / "x", name="x")
    backbone = check_content(Path("x"), *_contents(source)).card.backbone.model_dump()
    changes: dict[str, tuple[dict[str, Any], str]] = {
        "weights": ({"backbone": backbone | {"digest": "0" * 64}}, "with weights 0000"),
        "tokenizer": (
            {"backbone": backbone | {"tokenizer_digest": "0" * 64}},
            "with tokenizer 0000",
        ),
        "settings": ({"backbone": backbone | {"config_digest": "0" * 64}}, "settings"),
        "labels": ({"labels": ["a", "b", "c"]}, "classifier.weight"),
        "length": ({"max_length": 5000}, "reads at most"),
        "format": ({"format": 7}, "format 7"),
    }
    for name, (change, _) in changes.items():
        shutil.copytree(source, tmp_path / name)
        if name == "format":
            text = (tmp_path / name / CARD).read_text().replace('"format": 1', '"format": 7')
            (tmp_path / name / CARD).write_text(text)
        else:
            reseal(tmp_path / name, **change)
        store.install(name, files_of(tmp_path / name))
    found = watched.scan()
    assert found == dict.fromkeys(sorted([*changes, "good"])) | {"good": digest(versions[0])}
    for name, (_, words) in changes.items():
        assert words in watched.told[name]["refused"], name
        with pytest.raises(AdapterError, match=words):
            watched.registry.install("new", files_of(tmp_path / name))
    assert "new" not in store.scan()


def _contents(folder: Path) -> tuple[bytes, bytes, bytes]:
    files = files_of(folder)
    return files[CARD], files[WEIGHTS], files[CONFIG]


def test_names(tasks: Tasks, versions: list[dict[str, bytes]], tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    watched = Watched(store, tasks)
    good = ("a", "straße/größe", "дом", "日本", "a.b-c_d", "a/b/c/d/e", "x/run/adapter", "v1.2")
    bad = ("with space", "-x", "e\u0301", "a\nb", "x\u202ey", "q'uote")
    for name in (*good, *bad, ".hidden", "a/b/c/d/e/f/g"):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        for file, content in versions[0].items():
            (folder / file).write_bytes(content)
    found = watched.scan()
    answering = {name.removesuffix("/adapter") for name in good} - {"a/b/c/d/e"}
    assert {name for name, own in found.items() if own} == answering
    assert {name for name, own in found.items() if not own} == set(bad)
    for name in (*bad, "", "/", "..", "a/../b", "a//b", "/a", "a/", ".a", "a/.b", "x\0", "a\\b"):
        assert why_not_a_name(name), name
        with pytest.raises(AdapterError, match="cannot name a task"):
            watched.registry.install(name, versions[0])
    assert why_not_a_name("/".join("a" * (MAX_PARTS + 1)))
    assert why_not_a_name("x" * 121)
    assert why_not_a_name("x/adapter")


def test_names_that_stand_in_the_way(
    tasks: Tasks, versions: list[dict[str, bytes]], tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    root = tmp_path / "root"
    for folder in (outside, root, root / "run"):
        folder.mkdir()
    (root / "link").symlink_to(outside)
    watched = Watched(FolderStore(root), tasks)
    install = watched.registry.install
    install("acme/x", versions[0])
    for name in ("acme", "acme/x/y", "link"):
        with pytest.raises(AdapterError, match=r"is a folder of other tasks|is a task itself"):
            install(name, versions[0])
    for name in ("link/x", "link/deep/er/x"):
        with pytest.raises(AdapterError, match="leads out of the folder"):
            install(name, versions[0])
    assert list(outside.iterdir()) == []
    (root / "file").write_text("x")
    with pytest.raises((AdapterError, OSError)):
        install("file/x", versions[0])
    install("run", versions[0])  # an empty folder is in nobody's way
    assert set(watched.scan()) == {"acme/x", "run"}
    assert {path.name for path in root.iterdir()} == {"acme", "link", "run", "file"}


def test_what_cannot_be_looked_at_stops_nobody(
    tasks: Tasks, versions: list[dict[str, bytes]], tmp_path: Path
) -> None:
    """Links that lead round in circles, a pipe and a huge file among the adapters."""
    store = FolderStore(tmp_path)
    watched = Watched(store, tasks)
    for name in ("a", "m/x", "z"):
        store.install(name, versions[0])
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "m" / "loop").symlink_to("loop")
    (tmp_path / "round").symlink_to(tmp_path / "m")
    (tmp_path / "m" / "back").symlink_to(tmp_path / "m")
    for name, file in (("pipe", CARD), ("pipe too", WEIGHTS), ("huge", WEIGHTS)):
        folder = tmp_path / name.replace(" ", "-")
        folder.mkdir()
        for own, content in versions[0].items():
            (folder / own).write_bytes(content)
        (folder / file).unlink()
        if name == "huge":
            with (folder / file).open("wb") as sparse:
                sparse.truncate(10**12)
        else:
            os.mkfifo(folder / file)
    found = watched.scan()
    assert {name for name in ("a", "m/x", "z") if found[name]} == {"a", "m/x", "z"}
    assert "is not a plain file" in watched.told["pipe"]["refused"]
    assert "is not a plain file" in watched.told["pipe-too"]["refused"]
    assert "1,000,000,000,000 bytes" in watched.told["huge"]["refused"]
    store.install("new", versions[1])
    assert watched.scan()["new"] == digest(versions[1])


def test_what_cannot_be_looked_at_for_a_moment_goes_on_answering(
    tasks: Tasks, versions: list[dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FolderStore(tmp_path)
    watched = Watched(store, tasks)
    for name in ("a", "m/x", "m/y", "z"):
        store.install(name, versions[0])
    before = watched.scan()
    stat, scandir = os.stat, os.scandir

    def fail(path: Any, *rest: Any, **options: Any) -> Any:
        if str(path).startswith((f"{tmp_path}/a", f"{tmp_path}/m/x")):
            raise OSError(5, "Input/output error")
        return stat(path, *rest, **options)

    def fail_too(path: Any) -> Any:
        if str(path) == f"{tmp_path}/m":
            raise PermissionError
        return scandir(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", fail)
        assert watched.scan() == before
        patch.setattr(os, "scandir", fail_too)
        assert watched.scan() == before
        num_told = watched.num_told
        for _ in range(130):  # longer than it takes to look at all files of all
            watched.scan()
        assert watched.num_told == num_told
        assert {info["refused"] for info in watched.told.values()} == {None}
    shutil.rmtree(tmp_path / "m" / "x")
    assert set(watched.scan()) == {"a", "m/y", "z"}


def test_a_removed_task_leaves_no_folder_in_the_way(
    tasks: Tasks, versions: list[dict[str, bytes]], tmp_path: Path
) -> None:
    watched = Watched(FolderStore(tmp_path), tasks)
    for name in ("a/b/c", "a/d"):
        watched.registry.install(name, versions[0])
    watched.registry.remove("a/b/c")
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"d"}
    watched.registry.install("a/b", versions[0])
    for name in ("a/b", "a/d"):
        watched.registry.remove(name)
    assert list(tmp_path.iterdir()) == []
    watched.registry.install("a", versions[0])
    assert set(watched.scan()) == {"a"}


def test_a_run_is_known_by_its_name(
    tasks: Tasks, versions: list[dict[str, bytes]], tmp_path: Path
) -> None:
    watched = Watched(FolderStore(tmp_path), tasks)
    for name in ("runs/one/adapter", "runs/two"):
        (tmp_path / name).mkdir(parents=True)
        for file, content in versions[0].items():
            (tmp_path / name / file).write_bytes(content)
    assert set(watched.scan()) == {"runs/one", "runs/two"}
    watched.registry.install("runs/one", versions[1])
    assert digest(files_of(tmp_path / "runs/one/adapter")) == digest(versions[1])
    watched.registry.remove("runs/one")
    assert set(watched.scan()) == {"runs/two"}


def test_a_folder_that_cannot_be_read_changes_nothing(
    tasks: Tasks, versions: list[dict[str, bytes]], tmp_path: Path
) -> None:
    root = tmp_path / "adapters"
    root.mkdir()
    store = FolderStore(root)
    watched = Watched(store, tasks)
    store.install("x", versions[0])
    watched.scan()
    root.rename(tmp_path / "away")
    assert watched.registry.scan() is False
    assert tasks.predict([("x", LONG)])
    (tmp_path / "away").rename(root)
    assert watched.scan() == {"x": digest(versions[0])}
    with pytest.raises(PastinaError, match="no folder"):
        open_store(str(tmp_path / "nowhere"))
    with pytest.raises(PastinaError, match="cannot be opened"):
        open_store("nonsense://bucket/adapters")


def test_restart_finds_the_same(
    store: Store, tasks: Tasks, versions: list[dict[str, bytes]], bert: Path
) -> None:
    for i, files in enumerate(versions):
        store.install(f"task{i}", files)
    first, second = Watched(store, tasks), Watched(store, Tasks(str(bert)))
    assert first.scan() == second.scan()
    assert first.told == second.told
    assert len(first.told) == 3


def test_removing_takes_nothing_else(
    store: Store, tasks: Tasks, versions: list[dict[str, bytes]]
) -> None:
    """Tasks whose names begin alike are others; none stands within another."""
    watched = Watched(store, tasks)
    for name in ("acme/x", "acme/xy", "b"):
        watched.registry.install(name, versions[0])
    for name, words in (("acme/x/z", "cannot hold others"), ("acme", "folder of other tasks")):
        with pytest.raises(AdapterError, match=words):
            watched.registry.install(name, versions[1])
    assert watched.registry.remove("acme/x")
    assert set(watched.scan()) == {"acme/xy", "b"}
    assert watched.registry.remove("acme/xy")
    watched.registry.install("acme", versions[1])  # nothing is left in the way
    assert set(watched.scan()) == {"acme", "b"}


def test_an_adapter_within_another_is_not_seen(
    tasks: Tasks, versions: list[dict[str, bytes]], tmp_path: Path
) -> None:
    fs: Any = fsspec.filesystem("memory")
    root = f"/{tmp_path.name}"
    for name in ("x", "x/inner"):
        for file, content in versions[0].items():
            fs.pipe_file(f"{root}/{name}/{file}", content)
    watched = Watched(RemoteStore(fs, root), tasks)
    assert set(watched.scan()) == {"x"}
    assert watched.registry.remove("x")
    assert set(watched.scan()) == {"x/inner"}, "that is another one's"


def test_a_link_leads_nowhere(
    tasks: Tasks, versions: list[dict[str, bytes]], tmp_path: Path
) -> None:
    """What lies elsewhere is answered from, but not changed."""
    (tmp_path / "adapters").mkdir()
    FolderStore(tmp_path).install("elsewhere/x", versions[0])
    (tmp_path / "adapters/link").symlink_to(tmp_path / "elsewhere")
    watched = Watched(FolderStore(tmp_path / "adapters"), tasks)
    assert set(watched.scan()) == {"link/x"}
    with pytest.raises(AdapterError, match="leads out"):
        watched.registry.install("link/x", versions[1])
    with pytest.raises(AdapterError, match="leads out"):
        watched.registry.remove("link/x")
    assert watched.scan() == {"link/x": digest(versions[0])}


@pytest.mark.parametrize("is_new", [True, False])
def test_killed_at_each_write_elsewhere(
    is_new: bool, tasks: Tasks, versions: list[dict[str, bytes]], tmp_path: Path
) -> None:
    """Where nothing can be renamed: after each write the old version is there, or the new one."""
    seen: list[str | None] = []
    for last in range(100):
        fs: Any = fsspec.filesystem("memory")
        root = f"/{tmp_path.name}/{last}"
        fs.makedirs(root)
        if not is_new:
            RemoteStore(fs, root).install("acme/x", versions[0])
        try:
            RemoteStore(_Killed(fs, last), root).install("acme/x", versions[1])
        except SystemExit:
            pass
        else:
            break
        found = Watched(RemoteStore(fs, root), Bank(tasks.bank.backbone)).scan()
        seen.append(found.get("acme/x"))
        assert set(found) == ({"acme/x"} if found else set())
        RemoteStore(fs, root).install("acme/x", versions[2])  # what was left is in nobody's way
        after = Watched(RemoteStore(fs, root), Bank(tasks.bank.backbone)).scan()
        assert after == {"acme/x": digest(versions[2])}
    before = None if is_new else digest(versions[0])
    assert len(seen) > 6
    assert seen == sorted(seen, key=lambda one: one != before), (
        "first the old one, then the new one"
    )
    assert set(seen) == {before, digest(versions[1])}


class _Killed:
    """A file system of which the writer is killed before one of its changes."""

    def __init__(self, fs: Any, after: int) -> None:
        self.fs, self.left = fs, after

    def __getattr__(self, name: str) -> Any:
        if name in ("pipe_file", "rm_file", "rmdir", "makedirs"):
            if not self.left:
                raise SystemExit
            self.left -= 1
        return getattr(self.fs, name)


def test_a_move_that_was_broken_off_is_finished(
    tasks: Tasks, versions: list[dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs: Any = fsspec.filesystem("memory")
    root = f"/{tmp_path.name}"
    for file, content in versions[0].items():
        fs.pipe_file(f"{root}/.upload/acme/x/{file}", content)
    watched = Watched(RemoteStore(fs, root), tasks)
    for seconds in (60.0, 0.0):
        monkeypatch.setattr("pastina.serve.remote._MOVED", seconds)
        for _ in range(3):
            assert watched.scan() == {"acme/x": digest(versions[0])}
            watched.registry.look_again()
    assert sorted(fs.find(root)) == sorted(f"{root}/acme/x/{file}" for file in versions[0])


def test_a_folder_that_is_gone_elsewhere_changes_nothing(
    tasks: Tasks, versions: list[dict[str, bytes]], tmp_path: Path
) -> None:
    fs: Any = fsspec.filesystem("memory")
    root = f"/{tmp_path.name}"
    watched = Watched(RemoteStore(fs, root), tasks)
    assert watched.scan() == {}, "a bucket has no folders: nothing is there yet"
    for name in ("x", "y"):
        watched.registry.install(name, versions[0])
    watched.scan()
    fs.rm(root, recursive=True)
    assert watched.registry.scan() is False
    assert tasks.predict([("x", LONG)])
    fs.makedirs(root)
    assert watched.scan() == {}


def test_a_local_address_is_a_folder(tmp_path: Path) -> None:
    assert isinstance(open_store(f"file://{tmp_path}"), FolderStore)
    with pytest.raises(PastinaError, match="no folder"):
        open_store(f"file://{tmp_path}/nowhere")


def test_weights_that_change_alone_are_seen(
    store: Store, tasks: Tasks, versions: list[dict[str, bytes]], tmp_path: Path
) -> None:
    """Sooner or later: the old version goes on answering, and the list says what is wrong."""
    watched = Watched(store, tasks)
    for name in ("a", "b", "c"):
        watched.registry.install(name, versions[0])
    broken = bytearray(versions[0][WEIGHTS])
    broken[-1] ^= 1
    if isinstance(store, FolderStore):
        (tmp_path / "adapters/b" / WEIGHTS).write_bytes(broken)
    else:
        fsspec.filesystem("memory").pipe_file(f"/{tmp_path.name}/b/{WEIGHTS}", bytes(broken))
    for _ in range(70):
        watched.scan()
    assert "changed after it was written" in watched.told["b"]["refused"]
    assert [watched.told[name]["refused"] for name in ("a", "c")] == [None, None]
    assert tasks.predict([("b", LONG)])


def test_others_change_the_folder_too(
    tasks: Tasks, versions: list[dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another server removes what this one is about to write or to remove."""
    store, other = FolderStore(tmp_path), FolderStore(tmp_path)
    watched = Watched(store, tasks)
    watched.registry.install("acme/x", versions[0])
    other.remove("acme/x")
    assert watched.registry.remove("acme/x")
    assert watched.scan() == {}
    install = FolderStore.install

    def and_gone(self: FolderStore, name: str, files: dict[str, bytes]) -> None:
        install(self, name, files)
        other.remove(name)

    monkeypatch.setattr(FolderStore, "install", and_gone)
    assert watched.registry.install("acme/x", versions[1])["digest"] == digest(versions[1])
    assert watched.scan() == {}


def test_a_backbone_that_is_not_here_is_not_chosen(
    store: Store, versions: list[dict[str, bytes]], bert: Path, make: Make, tmp_path: Path
) -> None:
    """A foreign adapter is refused; it does not keep the others from answering."""
    source = make(tmp_path / "x")
    card = check_content(Path("x"), *_contents(source)).card
    other = reseal(source, backbone=card.backbone.model_dump() | {"name": "somebody/else"})
    store.install("a", files_of(other))
    store.install("b", versions[0])
    assert choose_backbone(store).name == card.backbone.name
    store.install("a2", files_of(other))
    assert choose_backbone(store).name == card.backbone.name


def test_which_backbone(
    store: Store, versions: list[dict[str, bytes]], bert: Path, make: Make, tmp_path: Path
) -> None:
    assert choose_backbone(store).name.endswith("MiniLM-L6-v2")
    source = make(tmp_path / "x")
    card = check_content(Path("x"), *_contents(source)).card
    other = reseal(source, backbone=card.backbone.model_dump() | {"name": "somebody/else"})
    store.install("a", files_of(other))
    assert choose_backbone(store).name == "somebody/else"
    store.install("b", versions[0])
    store.install("c", versions[1])
    store.install("0", {CARD: b"{"})
    assert choose_backbone(store).name == card.backbone.name


def test_the_thousandth_takes_no_longer(
    tasks: Tasks, versions: list[dict[str, bytes]], tmp_path: Path
) -> None:
    """Many are there already; one more is put in, in the time that the first ones took."""
    watched = Watched(FolderStore(tmp_path), tasks)
    few = min(_seconds(watched, f"few/{i}", versions[0]) for i in range(5))
    for i in range(400):
        (tmp_path / f"many{i}").mkdir()
        for file, content in versions[1].items():
            (tmp_path / f"many{i}" / file).write_bytes(content)
    watched.scan()
    assert len(tasks) == 405
    many = min(_seconds(watched, f"last/{i}", versions[0]) for i in range(5))
    assert many < 3 * few


def _seconds(watched: Watched, name: str, files: dict[str, bytes]) -> float:
    started = time.perf_counter()
    watched.registry.install(name, files)
    return time.perf_counter() - started


def test_killed_at_any_moment(
    tasks: Tasks, versions: list[dict[str, bytes]], tmp_path: Path
) -> None:
    """kill -9 in the middle of writing: every task that is to be seen is whole."""
    root = tmp_path / "adapters"
    root.mkdir()
    draw, seen = random.Random(1), set()
    whole = {digest(versions[0]), digest(versions[1])}
    for _ in range(8):
        process = _server.Process(target=install_for_ever, args=(root, versions[:2]))
        process.start()
        wait_until((root / ".began").exists)
        time.sleep(draw.random() * 0.05)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        (root / ".began").unlink()
        found = Watched(FolderStore(root), Bank(tasks.bank.backbone)).scan()
        assert set(found.values()) <= whole
        seen |= set(found)
    assert "acme/x" in seen
    # what was left aside goes, but not what somebody may be writing right now
    left = list(root.glob(".upload-*"))
    for path in left:
        os.utime(path, (0, 0))
    (root / ".upload-now").mkdir()
    FolderStore(root).install("acme/x", versions[0])
    assert [path.name for path in root.glob(".upload-*")] == [".upload-now"]


class _Forbidding:
    """A file system in which the files of some tasks may not be looked at for a while."""

    def __init__(self, fs: Any, path: str) -> None:
        self.fs, self.path, self.is_forbidden = fs, path, True

    def __getattr__(self, name: str) -> Any:
        return getattr(self.fs, name)

    def info(self, path: str) -> Any:
        if self.is_forbidden and path.startswith(self.path):
            raise PermissionError(path)
        return self.fs.info(path)


def test_a_task_that_cannot_be_looked_at_stops_nobody(
    tasks: Tasks, versions: list[dict[str, bytes]], tmp_path: Path
) -> None:
    inner: Any = fsspec.filesystem("memory")
    root = f"/{tmp_path.name}"
    for name in ("a", "b"):
        RemoteStore(inner, root).install(name, versions[0])
    fs = _Forbidding(inner, f"{root}/a/")
    watched = Watched(RemoteStore(fs, root), tasks)
    assert watched.scan() == {"b": digest(versions[0])}
    fs.is_forbidden = False
    assert watched.scan() == {"a": digest(versions[0]), "b": digest(versions[0])}


def test_changes_are_told_while_others_are_read(
    tasks: Tasks, versions: list[dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the other process would take a task for what it was, for as long as a large folder takes."""
    monkeypatch.setattr("pastina.serve.registry._TELL", -1.0)
    store = FolderStore(tmp_path)
    for name in "abc":
        store.install(name, versions[0])
    watched = Watched(store, tasks)
    assert len(watched.scan()) == watched.num_told == 3


def test_a_removed_adapter_of_a_run_can_come_again(
    tasks: Tasks, versions: list[dict[str, bytes]], tmp_path: Path
) -> None:
    place = tmp_path / "runs/one/adapter"
    place.mkdir(parents=True)
    for file, content in versions[0].items():
        (place / file).write_bytes(content)
    (tmp_path / "runs/one/recipe.toml").write_text("")
    watched = Watched(FolderStore(tmp_path), tasks)
    watched.scan()
    for store in (watched.registry.store, FolderStore(tmp_path)):  # one that never saw it, too
        watched.registry.remove("runs/one")
        watched.scan()
        watched.registry.store = store
        assert watched.registry.install("runs/one", versions[1])["digest"] == digest(versions[1])
        assert files_of(place) == versions[1]
        assert watched.scan() == {"runs/one": digest(versions[1])}
    with pytest.raises(AdapterError, match="folder of other tasks"):
        watched.registry.install("runs", versions[1])


@pytest.mark.parametrize("is_folder", [True, False])
def test_what_is_not_an_adapters_is_not_lost_with_it(
    tasks: Tasks, versions: list[dict[str, bytes]], tmp_path: Path, is_folder: bool
) -> None:
    store = FolderStore(tmp_path)
    store.install("x", versions[0])
    other = tmp_path / "x/notes"
    other.mkdir() if is_folder else other.write_text("of somebody")
    (tmp_path / "x/.hidden").write_text("may go")
    watched = Watched(store, tasks)
    watched.scan()
    for change in (lambda: store.remove("x"), lambda: store.install("x", versions[1])):
        with pytest.raises(AdapterError, match="'notes'"):
            change()
    assert watched.scan() == {"x": digest(versions[0])}
    assert other.exists()


def test_labels_that_are_there_twice(tasks: Tasks, make: Make, tmp_path: Path) -> None:
    files = files_of(reseal(make(tmp_path / "x", labels=("a", "b")), labels=["a", "a"]))
    (tmp_path / "y").mkdir()
    with pytest.raises(AdapterError, match="twice"):
        Watched(FolderStore(tmp_path / "y"), tasks).registry.install("x", files)


def test_in_a_bucket_what_is_not_an_adapters_stays(
    versions: list[dict[str, bytes]], tmp_path: Path
) -> None:
    fs: Any = fsspec.filesystem("memory")
    root = f"/{tmp_path.name}"
    store = RemoteStore(fs, root)
    store.install("x", versions[0])
    fs.pipe_file(f"{root}/x/notes", b"of somebody")
    store.install("x", versions[1])
    assert store.read("x")[1] == versions[1][CARD]
    store.remove("x")
    assert fs.find(root) == [f"{root}/x/notes"]

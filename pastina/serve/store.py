"""The folder that says which tasks there are: on a disk, or wherever fsspec reaches.

A task's adapter is known by the path of its folder; what begins with a dot is written aside by somebody
at this moment, or was left by a crash, and is not looked at.
"""

import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from pastina.adapter import CARD, CONFIG, WEIGHTS
from pastina.errors import AdapterError, PastinaError, need
from pastina.files import fsync, replace_folder
from pastina.serve.names import MAX_PARTS, task_name

Signature = tuple[Any, ...]  # other content, other signature
_FILES = (CARD, WEIGHTS, CONFIG)
_LARGEST = 500_000_000  # bytes of a file; that of thousands of vectors for a large backbone
_STALE = 3600.0  # seconds after which what lies aside was left by a crash


class Store(Protocol):
    """Where adapters lie. Any OSError means that it cannot be reached right now."""

    def scan(self) -> dict[str, Signature]:
        """Each task's name, with a signature that changes with its card."""
        ...

    def find(self, name: str) -> Signature | None:
        """The signature that `scan` would give for this task; None if it is not there."""
        ...

    def look(self, name: str) -> Signature:
        """A signature that changes with any of its files; () if it is not there."""
        ...

    def read(self, name: str) -> tuple[Path, bytes, bytes, bytes]:
        """Where it lies, for messages; the content of its card, weights and config.

        Raises:
            AdapterError: a file is missing.
        """
        ...

    def install(self, name: str, files: Mapping[str, bytes]) -> None:
        """Write an adapter; one that was there is replaced whole, or not at all."""
        ...

    def remove(self, name: str) -> None:
        """Remove an adapter."""
        ...


def open_store(place: str) -> Store:
    """The store at a folder or at an address such as s3://bucket/adapters.

    Raises:
        PastinaError: there is no such folder; what the address needs is not installed.
    """
    if "://" not in place and "::" not in place:
        folder = Path(place)
        if not folder.is_dir():
            raise PastinaError(f"There is no folder {folder}. Make it, or name another one.")
        return FolderStore(folder)
    fsspec: Any = need("fsspec", "serve")
    try:
        fs, root = fsspec.core.url_to_fs(place)
    except (ImportError, ValueError) as error:
        raise PastinaError(f"{place} cannot be opened: {error}.") from None
    return RemoteStore(fs, root)


class FolderStore:
    """Adapters in a local folder."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self._found: dict[str, tuple[str, Signature]] = {}  # of each task, what the last scan saw

    def scan(self) -> dict[str, Signature]:
        # with paths as texts: this is done every second, beside the engine, for thousands of tasks
        found: dict[str, tuple[str, Signature]] = {}
        root = str(self.root)
        before = dict(self._found.values())
        for path, signature in self._cards(root, before, MAX_PARTS + 1):
            name = task_name(path[len(root) + 1 :])
            name = name.encode(errors="backslashreplace").decode()  # a name that is not Unicode
            found.setdefault(name, (path, signature))
        self._found = found
        return {name: signature for name, (_, signature) in found.items()}

    def find(self, name: str) -> Signature | None:
        path = self._path(name)
        try:
            return _of_card(path.name, (path / CARD).stat())
        except (FileNotFoundError, NotADirectoryError):
            return None

    def _cards(
        self, folder: str, before: Mapping[str, Signature], depth: int
    ) -> Iterator[tuple[str, Signature]]:
        """The adapters below a folder; in an adapter's folder nothing else is looked for.

        before: what was seen by path; where something cannot be looked at, that still holds.
        """
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if _may_hold_adapters(entry))
        for name in names:
            path = f"{folder}/{name}"
            try:
                yield path, _of_card(name, os.stat(f"{path}/{CARD}"))  # noqa: PTH116  # pathlib takes three times as long
            except FileNotFoundError:
                if depth > 1:
                    yield from self._below(path, before, depth - 1)
            except NotADirectoryError:
                pass
            except OSError:
                yield from _still_there(path, before)

    def _below(
        self, folder: str, before: Mapping[str, Signature], depth: int
    ) -> Iterator[tuple[str, Signature]]:
        try:
            yield from self._cards(folder, before, depth)
        except (FileNotFoundError, NotADirectoryError):
            return  # gone while we were looking
        except OSError:
            yield from _still_there(folder, before)

    def look(self, name: str) -> Signature:
        seen = []
        for file in _FILES:
            try:
                about = (self._path(name) / file).stat()
                seen.append((about.st_ino, about.st_mtime_ns, about.st_size))
            except OSError:
                seen.append(())
        return tuple(seen) if any(seen) else ()

    def read(self, name: str) -> tuple[Path, bytes, bytes, bytes]:
        path = self._path(name)
        card, weights, config = (_bytes(path / file) for file in _FILES)
        return path, card, weights, config

    def _path(self, name: str) -> Path:
        path, _ = self._found.get(name, (None, ()))
        return self.root / name if path is None else Path(path)

    def install(self, name: str, files: Mapping[str, bytes]) -> None:
        self._sweep()
        folder = self._path(name)
        self._check_place(name, folder)
        aside = Path(tempfile.mkdtemp(dir=self.root, prefix=".upload-"))
        try:
            aside.chmod(0o755)
            for file, content in files.items():
                (aside / file).write_bytes(content)
            for path in (*aside.iterdir(), aside):
                fsync(path)
            folder.parent.mkdir(parents=True, exist_ok=True)
            replace_folder(aside, folder)
            for above in folder.relative_to(self.root).parents:  # some of them may be new
                fsync(self.root / above)
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def _check_place(self, name: str, folder: Path) -> None:
        """Nothing, if an adapter can stand there without hiding another or being hidden."""
        if not folder.parent.resolve().is_relative_to(self.root):
            raise AdapterError(f"{name!r} leads out of the folder by a link and is left alone.")
        if folder.is_symlink() or (folder.exists() and not (folder / CARD).is_file()):
            raise AdapterError(
                f"{name!r} is a folder of other tasks, a link or a file. Choose another name."
            )
        for above in folder.relative_to(self.root).parents[:-1]:
            if (self.root / above / CARD).exists():
                raise AdapterError(
                    f"{above.as_posix()!r} is a task itself and cannot hold others. Choose another name."
                )

    def _sweep(self) -> None:
        """Remove what a crash left aside; not what somebody writes at this moment."""
        for path in self.root.glob(".upload-*"):
            try:
                if time.time() - path.stat().st_mtime > _STALE:
                    shutil.rmtree(path, ignore_errors=True)
            except FileNotFoundError:
                pass

    def remove(self, name: str) -> None:
        folder = self._path(name)
        aside = Path(tempfile.mkdtemp(dir=self.root, prefix=".upload-"))
        try:
            folder.rename(aside / "removed")
            fsync(folder.parent)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        for above in folder.relative_to(self.root).parents[:-1]:
            try:  # an empty folder would stand in the way of a task of its name
                (self.root / above).rmdir()
            except OSError:
                break


def _of_card(folder: str, card: os.stat_result) -> Signature:
    return (folder, card.st_ino, card.st_mtime_ns, card.st_size)


def _may_hold_adapters(entry: os.DirEntry[str]) -> bool:
    """Whether this is a folder, or a link, which may lead to one."""
    return entry.name[0] != "." and (entry.is_symlink() or entry.is_dir(follow_symlinks=False))


def _still_there(folder: str, before: Mapping[str, Signature]) -> Iterator[tuple[str, Signature]]:
    """What was seen at this place or below, when it cannot be looked at: nothing is taken for gone
    that perhaps is not."""
    for path, signature in before.items():
        if path == folder or path.startswith(f"{folder}/"):
            yield path, signature


class RemoteStore:
    """Adapters behind fsspec, for instance in a bucket.

    There is no renaming there: the card is written last and removed first, and its digest tells
    whether the other files belong to it.
    """

    def __init__(self, fs: Any, root: str) -> None:
        self.fs, self.root = fs, root.rstrip("/")

    def scan(self) -> dict[str, Signature]:
        self.fs.invalidate_cache()
        found: dict[str, Signature] = {}
        for path, info in sorted(self.fs.find(self.root, detail=True).items()):
            inner, _, file = path.removeprefix(self.root).lstrip("/").rpartition("/")
            is_aside = any(part.startswith(".") for part in inner.split("/"))
            if file == CARD and inner and not is_aside:
                found.setdefault(task_name(inner), (inner, _stamp(info)))
        return found

    def find(self, name: str) -> Signature | None:
        self.fs.invalidate_cache()
        path = self._path(name)
        try:
            info = self.fs.info(f"{path}/{CARD}")
        except FileNotFoundError:
            return None
        return (path.removeprefix(self.root).lstrip("/"), _stamp(info))

    def look(self, name: str) -> Signature:
        self.fs.invalidate_cache()
        seen = []
        for file in _FILES:
            try:
                seen.append(_stamp(self.fs.info(f"{self._path(name)}/{file}")))
            except FileNotFoundError:
                seen.append(())
        return tuple(seen) if any(seen) else ()

    def read(self, name: str) -> tuple[Path, bytes, bytes, bytes]:
        path = self._path(name)
        found = []
        for file in _FILES:
            try:
                found.append(self.fs.cat_file(f"{path}/{file}"))
            except FileNotFoundError:
                raise AdapterError(f"{path} is not an adapter: {file} is missing.") from None
        card, weights, config = found
        return Path(path), card, weights, config

    def _path(self, name: str) -> str:
        path = f"{self.root}/{name}"
        return path if self.fs.exists(f"{path}/{CARD}") else _run_path(self.fs, path)

    def install(self, name: str, files: Mapping[str, bytes]) -> None:
        path = f"{self.root}/{name}"
        self.fs.makedirs(path, exist_ok=True)
        for file in sorted(files, key=lambda file: file == CARD):
            self.fs.pipe_file(f"{path}/{file}", files[file])

    def remove(self, name: str) -> None:
        path = self._path(name)
        self.fs.rm_file(f"{path}/{CARD}")
        self.fs.rm(path, recursive=True)


def _run_path(fs: Any, path: str) -> str:
    inner = f"{path}/adapter"
    return inner if fs.exists(f"{inner}/{CARD}") else path


def _stamp(info: Mapping[str, Any]) -> Signature:
    """Of what file systems say of a file that which changes with its content."""
    names = ("size", "ETag", "etag", "mtime", "LastModified", "last_modified", "created", "updated")
    return tuple(str(info.get(name)) for name in (*names, "generation", "ino"))


def _bytes(path: Path) -> bytes:
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):  # a pipe would keep us waiting for ever
            raise AdapterError(f"{path} is not a plain file.")
        if about.st_size > _LARGEST:
            raise AdapterError(
                f"{path} has {about.st_size:,} bytes, and {_LARGEST:,} are the most that is read."
            )
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise AdapterError(f"{path.parent} is not an adapter: {path.name} is missing.") from None

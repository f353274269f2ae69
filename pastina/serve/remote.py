"""Adapters wherever fsspec reaches, for instance in a bucket."""

import math
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pastina.errors import AdapterError
from pastina.files import CARD
from pastina.serve.archive import FILES as ARCHIVED
from pastina.serve.names import task_name
from pastina.serve.store import FILES, Signature

_ASIDE = ".upload"  # a folder beside the tasks
_MOVED = 60.0  # seconds after which a server that was moving a new version has been killed


class RemoteStore:
    """Adapters behind fsspec.

    There is no renaming there, so a new version is written aside first, its card last. As long as it
    lies there whole, it is the one that is read; meanwhile it is copied to its place. Killed at any
    moment, this leaves the old version or the new one.
    """

    def __init__(self, fs: Any, root: str) -> None:
        self.fs, self.root = fs, root.rstrip("/")
        self._num_tasks = 0
        self._tidied = -math.inf
        self._aside_since: dict[str, tuple[Signature, float]] = {}

    def scan(self) -> dict[str, Signature]:
        self.fs.invalidate_cache()
        files = self.fs.find(self.root, detail=True)
        by_folder: dict[str, dict[str, Signature]] = {}
        for path, info in files.items():
            inner, _, file = path.removeprefix(self.root).lstrip("/").rpartition("/")
            if file in FILES and inner:
                by_folder.setdefault(inner, {})[file] = _stamp(info)
        cards = {inner for inner, own in by_folder.items() if CARD in own}
        aside = {inner for inner in cards if inner.startswith(f"{_ASIDE}/")}
        found: dict[str, Signature] = {}
        for inner in sorted(aside) + sorted(cards - aside, key=lambda inner: inner.split("/")):
            is_hidden = inner not in aside and any(p.startswith(".") for p in inner.split("/"))
            if not is_hidden and not _above(inner, cards):
                name = task_name(inner.removeprefix(f"{_ASIDE}/"))
                found.setdefault(name, _signature(inner, by_folder[inner]))
        self._check_there(found)
        return found

    def _check_there(self, found: Mapping[str, Signature]) -> None:
        """Nothing, unless several tasks are gone with the folder itself: it is rather out of reach.

        Raises:
            FileNotFoundError: it is.
        """
        if self._num_tasks > 1 and not found:
            self._check_root()
        self._num_tasks = len(found)

    def _check_root(self) -> None:
        if not self.fs.exists(self.root):
            raise FileNotFoundError(f"{self.root} is gone; what it held is kept")

    def tidy(self) -> None:
        """What has been aside for long was left there by a server that was killed."""
        now = time.monotonic()
        if now - self._tidied < _MOVED / 4:
            return
        self._tidied, cards = now, self._cards_aside()
        before, self._aside_since = self._aside_since, {}
        for inner, card in cards.items():
            old, since = before.get(inner, (card, now))
            since = since if old == card else now
            self._aside_since[inner] = (card, since)
            if now - since > _MOVED:
                try:
                    self._move(inner.removeprefix(f"{_ASIDE}/"))
                except Exception:  # it may be read, but not written, or another server was faster
                    self._aside_since[inner] = (card, now)

    def _cards_aside(self) -> dict[str, Signature]:
        """Of whole adapters, by folder."""
        self.fs.invalidate_cache()
        try:
            files = self.fs.find(f"{self.root}/{_ASIDE}", detail=True)
        except FileNotFoundError:
            return {}
        return {
            self._inner(path).rpartition("/")[0]: _stamp(info)
            for path, info in files.items()
            if path.endswith(f"/{CARD}")
        }

    def find(self, name: str) -> Signature | None:
        self.fs.invalidate_cache()
        path = self._path(name)
        own = self._stamps(path)
        if CARD in own:
            return _signature(self._inner(path), own)
        if self._num_tasks > 1:
            self._check_root()
        return None

    def look(self, name: str) -> Signature:
        self.fs.invalidate_cache()
        path = self._path(name)
        own = self._stamps(path)
        return _signature(self._inner(path), own) if own else ()

    def _stamps(self, path: str) -> dict[str, Signature]:
        own: dict[str, Signature] = {}
        for file in FILES:
            with suppress(FileNotFoundError):
                own[file] = _stamp(self.fs.info(f"{path}/{file}"))
        return own

    def read(self, name: str) -> tuple[Path, bytes, bytes, bytes]:
        path = self._path(name)
        found = []
        for file in FILES:
            try:
                found.append(self.fs.cat_file(f"{path}/{file}"))
            except FileNotFoundError:
                raise AdapterError(f"{path} is not an adapter: {file} is missing.") from None
        card, weights, config = found
        return Path(path), card, weights, config

    def _inner(self, path: str) -> str:
        return path.removeprefix(self.root).lstrip("/")

    def _aside(self, name: str) -> str:
        return f"{self.root}/{_ASIDE}/{name}"

    def _path(self, name: str) -> str:
        """Where its version is that counts."""
        aside = self._aside(name)
        return aside if self.fs.exists(f"{aside}/{CARD}") else self._place(name)

    def _place(self, name: str) -> str:
        """Where it lies, or is to lie: a task may have the layout of a run."""
        path = f"{self.root}/{name}"
        inner = f"{path}/adapter"
        is_run = not self.fs.exists(f"{path}/{CARD}") and self.fs.exists(f"{inner}/{CARD}")
        return inner if is_run else path

    def install(self, name: str, files: Mapping[str, bytes]) -> None:
        self._check_place(name)
        aside = self._aside(name)
        self._remove_files(aside)
        self._write(aside, files)
        self._move(name)

    def _move(self, name: str) -> None:
        """Copy what lies aside to its place; only then is it removed there."""
        aside, place = self._aside(name), self._place(name)
        files = {path.rpartition("/")[2]: path for path in self._files(aside)}
        self._write(place, {file: self.fs.cat_file(path) for file, path in files.items()})
        self._remove_files(aside)

    def _write(self, path: str, files: Mapping[str, bytes]) -> None:
        self.fs.makedirs(path, exist_ok=True)
        for file in sorted(files, key=lambda file: file == CARD):
            self.fs.pipe_file(f"{path}/{file}", files[file])

    def _check_place(self, name: str) -> None:
        """Nothing, if an adapter can stand there without hiding another or being hidden."""
        self.fs.invalidate_cache()
        parts = name.split("/")
        for count in range(1, len(parts)):
            above = "/".join(parts[:count])
            if self.fs.exists(f"{self.root}/{above}/{CARD}"):
                raise AdapterError(
                    f"{above!r} is a task itself and cannot hold others. Choose another name."
                )
        place = self._place(name)
        below = [path for path in self.fs.find(place) if path.endswith(f"/{CARD}")]
        if any(path != f"{place}/{CARD}" for path in below):
            raise AdapterError(f"{name!r} is a folder of other tasks. Choose another name.")

    def remove(self, name: str) -> None:
        for path in (self._place(name), self._aside(name)):
            self._remove_files(path)

    def _remove_files(self, path: str) -> None:
        """The files of one adapter, its card first; what else lies there or below stays."""
        own = [file for file in self._files(path) if file.rpartition("/")[2] in ARCHIVED]
        for file in sorted(own, key=lambda file: not file.endswith(f"/{CARD}")):
            with suppress(FileNotFoundError):  # somebody else removes it at this moment
                self.fs.rm_file(file)
        while len(path) > len(self.root):
            try:  # an empty folder, where there is such a thing
                self.fs.rmdir(path)
            except Exception:  # of whatever fsspec reaches
                return
            path = path.rpartition("/")[0]

    def _files(self, path: str) -> list[str]:
        try:
            listed = self.fs.ls(path, detail=True, refresh=True)
        except FileNotFoundError:
            return []
        return [info["name"] for info in listed if info["type"] == "file"]


def _above(inner: str, cards: set[str]) -> bool:
    """Whether a folder above is an adapter itself."""
    parts = inner.split("/")
    return any("/".join(parts[:count]) in cards for count in range(1, len(parts)))


def _signature(inner: str, stamps: Mapping[str, Signature]) -> Signature:
    return (inner, *(stamps.get(file) for file in FILES))


def _stamp(info: Mapping[str, Any]) -> Signature:
    """Of what file systems say of a file that which changes with its content."""
    names = ("size", "ETag", "etag", "mtime", "LastModified", "last_modified", "created", "updated")
    return tuple(str(info.get(name)) for name in (*names, "generation", "ino"))

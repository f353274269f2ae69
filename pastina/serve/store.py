"""The folder that says which tasks there are: on a disk, or wherever fsspec reaches.

A task's adapter is known by the path of its folder; what begins with a dot is written aside by somebody
at this moment, or was left by a crash, and is not looked at.
"""

import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from pastina.errors import AdapterError, PastinaError, need
from pastina.files import CARD, CONFIG, WEIGHTS, fsync, replace_folder
from pastina.serve.archive import FILES as ARCHIVED
from pastina.serve.names import MAX_PARTS, RUN, task_name

Signature = tuple[Any, ...]  # other content, other signature
FILES = (CARD, WEIGHTS, CONFIG)
_LARGEST = 500_000_000  # bytes of a file; that of thousands of vectors for a large backbone
_WHOLE = 60  # scans after which all files of a task were looked at, not its card alone
_STALE = 3600.0  # seconds after which what lies aside was left by a crash


class Store(Protocol):
    """Where adapters lie; root is what their paths begin with. Any error but an AdapterError means that
    it, or a part of it, cannot be reached right now."""

    root: Any

    def scan(self) -> dict[str, Signature]:
        """Each task's name, with a signature that changes with its card at once, with its other files
        at once or after some more scans."""
        ...

    def find(self, name: str) -> Signature | None:
        """The signature that `scan` would give for this task; None if it is not there, or hidden."""
        ...

    def look(self, name: str) -> Signature:
        """A signature that changes with any of its files; () if it is not there."""
        ...

    def tidy(self) -> None:
        """Finish what a server left undone that was killed long ago."""
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
        """Remove an adapter, and nothing beside or below it that is another one's.

        Raises:
            AdapterError: it lies elsewhere.
        """
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
    from pastina.serve.remote import RemoteStore

    fsspec: Any = need("fsspec", "serve")
    try:
        fs, root = fsspec.core.url_to_fs(place)
    except (ImportError, ValueError) as error:
        raise PastinaError(f"{place} cannot be opened: {error}.") from None
    if isinstance(fs, fsspec.get_filesystem_class("file")):
        return open_store(root)
    return RemoteStore(fs, root)


class FolderStore:
    """Adapters in a local folder."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self._turn = 0
        self._seen: dict[str, Signature] = {}  # by path, at the last scan

    def scan(self) -> dict[str, Signature]:
        # with paths as texts: this is done every second for thousands of tasks
        found: dict[str, Signature] = {}
        seen: dict[str, Signature] = {}
        root, before = str(self.root), self._seen
        self._turn += 1
        for number, (path, signature) in enumerate(self._cards(root, before, MAX_PARTS + 1)):
            old = before.get(path, ())
            is_kept = signature == old  # it cannot be looked at for the moment
            is_due = (number + self._turn) % _WHOLE == 0
            is_known = is_kept or (old[: len(signature)] == signature and not is_due)
            signature = old if is_known else signature + _of_others(path)
            name = task_name(path[len(root) + 1 :])
            name = name.encode(errors="backslashreplace").decode()  # a name that is not Unicode
            found.setdefault(name, signature)
            seen[path] = signature
        self._seen = seen
        return found

    def find(self, name: str) -> Signature | None:
        path = self._path(name)
        if any((self.root / above / CARD).exists() for above in _above(path, self.root)):
            return None  # it is hidden by another adapter
        try:
            return _of_card(path.name, (path / CARD).stat()) + _of_others(str(path))
        except (FileNotFoundError, NotADirectoryError):
            self.root.stat()  # if all is out of reach, we do not know
            return None

    def _cards(
        self, folder: str, before: Mapping[str, Signature], depth: int
    ) -> Iterator[tuple[str, Signature]]:
        """The adapters below a folder, with the signatures of their cards; in an adapter's folder
        nothing else is looked for.

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
        for file in FILES:
            try:
                about = (self._path(name) / file).stat()
                seen.append((about.st_ino, about.st_mtime_ns, about.st_size))
            except OSError:
                seen.append(())
        return tuple(seen) if any(seen) else ()

    def read(self, name: str) -> tuple[Path, bytes, bytes, bytes]:
        path = self._path(name)
        card, weights, config = (_bytes(path / file) for file in FILES)
        return path, card, weights, config

    def _path(self, name: str) -> Path:
        place = self.root / name
        inner = place / RUN
        is_run = not (place / CARD).exists() and (inner / CARD).exists()
        return inner if is_run else place

    def install(self, name: str, files: Mapping[str, bytes]) -> None:
        self._sweep()
        folder = self._path(name)
        if self._is_run_without(folder):
            folder /= RUN
        self._check_inside(name, folder)
        self._check_place(name, folder)
        _check_own(folder)
        aside = Path(tempfile.mkdtemp(dir=self.root, prefix=".upload-"))
        try:
            aside.chmod(0o755)
            for file, content in files.items():
                (aside / file).write_bytes(content)
            for path in (*aside.iterdir(), aside):
                fsync(path)
            _put_in_place(aside, folder)
            for above in folder.relative_to(self.root).parents:  # some of them may be new
                fsync(self.root / above)
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def _check_inside(self, name: str, folder: Path) -> None:
        if not folder.parent.resolve().is_relative_to(self.root):
            raise AdapterError(f"{name!r} leads out of the folder by a link and is left alone.")

    def _is_run_without(self, folder: Path) -> bool:
        """Whether this is a run's folder, or another one, of which the adapter was removed."""
        if folder.is_symlink() or not folder.is_dir() or (folder / CARD).exists():
            return False
        return not os.path.lexists(folder / RUN) and not any(
            self._cards(str(folder), {}, MAX_PARTS)
        )

    def _check_place(self, name: str, folder: Path) -> None:
        """Nothing, if an adapter can stand there without hiding another or being hidden."""
        if folder.is_symlink() or (folder.exists() and not (folder / CARD).is_file()):
            raise AdapterError(
                f"{name!r} is a folder of other tasks, a link or a file. Choose another name."
            )
        for above in _above(folder, self.root):
            if (self.root / above / CARD).exists():
                raise AdapterError(
                    f"{above.as_posix()!r} is a task itself and cannot hold others. Choose another name."
                )

    def tidy(self) -> None:
        """Nothing: what is moved into its place at one stroke is never half there."""

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
        self._check_inside(name, folder)
        _check_own(folder)
        aside = Path(tempfile.mkdtemp(dir=self.root, prefix=".upload-"))
        try:
            folder.rename(aside / "removed")
            fsync(folder.parent)
        except FileNotFoundError:
            pass  # somebody else removed it at this moment
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        for above in _above(folder, self.root):
            try:  # an empty folder would stand in the way of a task of its name
                (self.root / above).rmdir()
            except OSError:
                break


def _above(folder: Path, root: Path) -> Sequence[Path]:
    """The folders between the two, as paths below root."""
    return folder.relative_to(root).parents[:-1]


def _check_own(folder: Path) -> None:
    """Nothing, if all that lies there is an adapter's, or hidden.

    Raises:
        AdapterError: something else would be lost with it.
    """
    try:
        names = sorted(path.name for path in folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return
    if others := [name for name in names if name not in ARCHIVED and not name.startswith(".")]:
        raise AdapterError(
            f"In the folder of this task lies {others[0]!r} too, which is not an adapter's. "
            "Move it away first."
        )


def _put_in_place(new: Path, folder: Path) -> None:
    """Also where somebody else removes the folder, or an empty one above it, at this moment."""
    for is_last in (False, False, True):
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            replace_folder(new, folder)
        except FileNotFoundError:
            if is_last:
                raise
        else:
            return


def _of_others(folder: str) -> Signature:
    """Of the files beside the card."""
    seen: list[Any] = []
    for file in (WEIGHTS, CONFIG):
        try:
            about = os.stat(f"{folder}/{file}")  # noqa: PTH116  # as for the card
        except OSError:
            seen.append(None)
        else:
            seen += (about.st_ino, about.st_mtime_ns, about.st_size)
    return tuple(seen)


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

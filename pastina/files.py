"""Writing so that a crash at any moment leaves the old file or the new one, never a part."""

import ctypes
import glob
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from pastina.errors import PastinaError

# the files of an adapter
CARD, WEIGHTS, CONFIG = "task.json", "adapter_model.safetensors", "adapter_config.json"


@contextmanager
def whole_file(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """A file opened for writing ("w", UTF-8, or "wb") that takes its name only when it is whole.

    Raises:
        PastinaError: the name belongs to a folder, a device or a pipe.
    """
    path = path.resolve()  # a link stays a link: what it points to is written
    if path.exists() and not path.is_file():
        raise PastinaError(f"{path} is not a plain file and is left alone. Name another file.")
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    encoding, newline = (None, None) if "b" in mode else ("utf-8", "")
    try:
        with os.fdopen(descriptor, mode, encoding=encoding, newline=newline) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        let_read(Path(aside))  # mkstemp lets nobody else
        Path(aside).replace(path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise


@contextmanager
def no_empty_folders(folder: Path) -> Iterator[None]:
    """The folder and those above it are made, and go again afterwards where they were not there before
    and hold nothing.
    """
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for path in new:
            with suppress(OSError):  # it holds something, or somebody else took it away
                path.rmdir()


def let_read(path: Path) -> None:
    """Give a file the rights of any new one, whatever library made it."""
    path.chmod(0o666 & ~_umask())


def fsync(path: Path) -> None:
    """Make sure that a file or the entries of a folder are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_folder(new: Path, folder: Path) -> None:
    """Put `new` in the place of `folder`, in one step where the system can.

    Something that stood there before is gone afterwards, or lies at `new`.
    """
    if not folder.exists():
        new.rename(folder)
    elif not _exchange(new, folder):
        old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        try:
            new.rename(folder)
        except BaseException:
            old.rename(folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
    fsync(folder.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Two folders change places at one stroke; False where the system does not know how."""
    libc = ctypes.CDLL(None) if os.name == "posix" else None
    here, swap = -100, 2  # AT_FDCWD; RENAME_EXCHANGE of Linux and RENAME_SWAP of macOS
    first, second = os.fsencode(one), os.fsencode(other)
    if hasattr(libc, "renameat2"):
        return libc.renameat2(here, first, here, second, swap) == 0
    if hasattr(libc, "renamex_np"):
        return libc.renamex_np(first, second, swap) == 0
    return False


def remove_leftovers(folder: Path, names: Iterable[str]) -> None:
    """Remove what a killed process had begun to write aside for these files and folders."""
    for name in names:
        for path in folder.glob(f".{glob.escape(name)}.*"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _umask() -> int:
    try:  # it cannot be asked for without being changed, for all threads, but Linux tells it
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        return next(int(line.split()[1], 8) for line in lines if line.startswith("Umask:"))
    except (OSError, StopIteration):
        mask = os.umask(0)
        os.umask(mask)
        return mask

"""An uploaded archive into an adapter's files, in memory: nothing of it is trusted, nothing written.

Only what an adapter consists of is taken, as plain files at the top or in one folder.
"""

import bz2
import gzip
import io
import json
import lzma
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO, Any

from pastina.errors import AdapterError

FILES = ("task.json", "adapter_config.json", "adapter_model.safetensors", "README.md")
_PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz", ".h5")
_MAX_MEMBERS = 16
_MAX_HEADER = 1_000_000  # bytes; the tensors of an adapter need a few thousand
_TAR_OVERHEAD = 100_000  # bytes of headers and padding
_MAX_TEXT = 4_000_000  # bytes of a file that is not the tensors
_BROKEN = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    OSError,
    ValueError,
    NotImplementedError,
    RuntimeError,
    struct.error,
    LookupError,
    OverflowError,
    MemoryError,
)


def unpack(content: bytes, max_bytes: int) -> dict[str, bytes]:
    """The files of an adapter from a zip or a tar (plain, gz, bz2, xz), by name.

    max_bytes: of all of them together, unpacked.

    Raises:
        AdapterError: it is not an archive, is broken, holds anything else, or unpacks to too much.
    """
    try:
        members = list(_members(content, max_bytes))
    except AdapterError:
        raise
    except _BROKEN as error:
        raise AdapterError(
            f"The archive is broken ({type(error).__name__}). Make it again."
        ) from None
    _check_places([path for path, _ in members])
    files = {path.rpartition("/")[2]: own for path, own in members}
    for name in FILES[:3]:
        if name not in files:
            raise AdapterError(f"The archive is not an adapter: {name} is missing.")
    check_header(files["adapter_model.safetensors"])
    return files


def _members(content: bytes, max_bytes: int) -> Iterator[tuple[str, bytes]]:
    if content[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return _of_zip(content, max_bytes)
    return _of_tar(content, max_bytes)


def _of_zip(content: bytes, max_bytes: int) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        infos = archive.infolist()
        _check_count(len(infos))
        left = max_bytes
        for info in infos:
            mode = info.external_attr >> 16
            if info.is_dir():
                _check_path(info.filename.rstrip("/"))
                continue
            if mode & 0o170000 not in (0, 0o100000):
                raise AdapterError(f"{_show(info.filename)} is a link or a device, not a file.")
            if info.flag_bits & 1:
                raise AdapterError(f"{_show(info.filename)} is encrypted.")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                # the others unpack a block whole, however large it becomes
                raise AdapterError(
                    f"{_show(info.filename)} is packed in a way that is not read here."
                )
            _check_file(info.filename)
            with archive.open(info) as file:
                own = _read(file, info.filename, left)
            left -= len(own)
            yield info.filename, own


def _of_tar(content: bytes, max_bytes: int) -> Iterator[tuple[str, bytes]]:
    left = max_bytes
    stream: Any = _Limited(_decompressed(content), max_bytes + _TAR_OVERHEAD)
    # as a stream: nothing is looked for by jumping to places that the archive names
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        for count, member in enumerate(archive, 1):
            _check_count(count)
            if member.isdir():
                _check_path(member.name)
                continue
            if not member.isreg() or member.issparse():
                raise AdapterError(f"{_show(member.name)} is a link or a device, not a file.")
            _check_file(member.name)
            file = archive.extractfile(member)
            assert file is not None
            own = _read(file, member.name, left)
            if len(own) != member.size:
                raise EOFError
            left -= len(own)
            yield member.name, own


def _decompressed(content: bytes) -> Any:
    file = io.BytesIO(content)
    if content[:2] == b"\x1f\x8b":
        return gzip.GzipFile(fileobj=file)
    if content[:3] == b"BZh":
        return bz2.BZ2File(file)
    if content[:6] == b"\xfd7zXZ\0":
        return lzma.LZMAFile(file)
    return file


class _Limited:
    """A stream that ends with an error instead of giving more than this: a header can be a bomb too."""

    def __init__(self, file: Any, left: int) -> None:
        self._file, self._limit, self._left = file, left, left

    def read(self, size: int) -> bytes:
        content = self._file.read(min(size, self._left + 1))
        self._left -= len(content)
        if self._left < 0:
            raise AdapterError(f"The archive unpacks to more than {self._limit:,} bytes.")
        return content


def _read(file: IO[bytes], path: str, left: int) -> bytes:
    """The file, whatever size the archive claims."""
    limit = left if path.endswith(".safetensors") else min(left, _MAX_TEXT)
    content = file.read(limit + 1)
    if len(content) > limit:
        raise _too_much(path, limit)
    return content


def _too_much(path: str, limit: int) -> AdapterError:
    return AdapterError(f"{_show(path)} unpacks to more than {limit:,} bytes.")


def _check_count(count: int) -> None:
    if count > _MAX_MEMBERS:
        raise AdapterError(
            f"The archive has more than {_MAX_MEMBERS} entries. Pack the adapter only."
        )


def _check_path(path: str) -> None:
    parts = path.removeprefix("./").split("/")
    is_inside = not path.startswith("/") and not set(parts) & {"..", ""} and "\\" not in path
    if path not in (".", "./") and (not is_inside or "\0" in path or ":" in path):
        raise AdapterError(f"{_show(path)} leads out of the archive.")


def _check_file(path: str) -> None:
    _check_path(path)
    name = path.rpartition("/")[2]
    if name.endswith(_PICKLED):
        raise AdapterError(
            f"{_show(path)} may run code when it is loaded. Adapters are safetensors and JSON only."
        )
    if name not in FILES:
        raise AdapterError(
            f"{_show(path)} is not part of an adapter. Pack {', '.join(FILES)} only."
        )


def _check_places(paths: list[str]) -> None:
    """Nothing, if all lie in the same folder, each once."""
    folders = {path.removeprefix("./").rpartition("/")[0] for path in paths}
    if len(folders) > 1:
        raise AdapterError("The archive holds files of several folders. Pack one adapter.")
    if len({path.removeprefix("./") for path in paths}) < len(paths):
        raise AdapterError("The archive holds a file twice.")


def check_header(weights: bytes) -> None:
    """Nothing, if this begins as safetensors do, with as many bytes as its header says.

    Raises:
        AdapterError: it does not.
    """
    size = int.from_bytes(weights[:8], "little")
    if _MAX_HEADER < size < len(weights):
        raise AdapterError(
            f"adapter_model.safetensors has a header of {size:,} bytes, and {_MAX_HEADER:,} are the "
            "most. Pack an adapter, not a whole model."
        )
    try:
        (size,) = struct.unpack_from("<Q", weights)
        header: Any = json.loads(weights[8 : 8 + size].decode())
        ends = [own["data_offsets"][1] for key, own in header.items() if key != "__metadata__"]
        is_whole = 8 + size <= len(weights) and len(weights) == 8 + size + max(ends, default=0)
    except (struct.error, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        is_whole = False
    if not is_whole:
        raise AdapterError("adapter_model.safetensors is not a whole safetensors file.")


def _show(path: str) -> str:
    return repr(path[:100])

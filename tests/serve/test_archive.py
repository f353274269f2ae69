"""Uploaded archives: what is taken, and what is refused before anything is written."""

import io
import json
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from pastina.errors import AdapterError
from pastina.serve.archive import check_header, unpack
from tests.serving import files_of, tarred, zipped

LIMIT = 400_000


@pytest.fixture(scope="module")
def files(folder: Path) -> dict[str, bytes]:
    return files_of(folder / "acme" / "topics")


WAYS: dict[str, Callable[[dict[str, bytes]], bytes]] = {
    "zip": zipped,
    "stored": lambda files: zipped(files, compression=zipfile.ZIP_STORED),
    "tar": lambda files: tarred(files, "w:"),
    "tar.gz": tarred,
    "tar.bz2": lambda files: tarred(files, "w:bz2"),
    "tar.xz": lambda files: tarred(files, "w:xz"),
    "in a folder": lambda files: zipped({f"x/{name}": own for name, own in files.items()}),
    "with a dot": lambda files: tarred({f"./{name}": own for name, own in files.items()}),
    "a folder entry": lambda files: zipped({"x/": b""} | {f"x/{n}": o for n, o in files.items()}),
    "no README": lambda files: zipped({n: o for n, o in files.items() if n != "README.md"}),
}


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_pack(files: dict[str, bytes], way: str) -> None:
    found = unpack(WAYS[way](files), LIMIT)
    assert all(files[name] == content for name, content in found.items())
    assert len(found) >= 3


def special(name: str, kind: bytes, to: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, to
    return info


def zip_link(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO(zipped(files))
    with zipfile.ZipFile(out, "a") as archive:
        info = zipfile.ZipInfo("README.md" if "README.md" not in files else "link")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "/etc/passwd")
    return out.getvalue()


def pax_bomb(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:xz", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo("task.json")
        info.pax_headers = {"comment": "x" * 5_000_000}
        archive.addfile(info)
    return out.getvalue()


def twice(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO(zipped(files))
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(out, "a") as archive:
        archive.writestr("task.json", b"{}")
    return out.getvalue()


def encrypted(files: dict[str, bytes]) -> bytes:
    content = bytearray(zipped(files))
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = content.find(mark)
        content[at + offset] |= 1
    return bytes(content)


ZEROS = b"\0" * 30_000_000
BROKEN: dict[str, tuple[Callable[[dict[str, bytes]], bytes], str]] = {
    "empty": (lambda files: b"", "broken|missing"),
    "noise": (lambda files: bytes(range(256)) * 50, "broken"),
    "cut zip": (lambda files: zipped(files)[:-200], "broken"),
    "cut tar": (lambda files: tarred(files, "w:")[:5000], "broken|missing"),
    "cut gz": (lambda files: tarred(files)[:-500], "broken"),
    "damaged": (
        lambda files: zipped(files).replace(b"\x00", b"\x01", 90),
        "broken|missing|leads|encrypted",
    ),
    "zip bomb": (
        lambda files: zipped(files | {"adapter_model.safetensors": ZEROS}),
        "unpacks to more than",
    ),
    "gz bomb": (
        lambda files: tarred(files | {"adapter_model.safetensors": ZEROS}),
        "unpacks to more than",
    ),
    "header bomb": (pax_bomb, "unpacks to more than"),
    "large card": (lambda files: zipped(files | {"task.json": b" " * 300_000}), "to more than"),
    "many entries": (lambda files: zipped({f"{i}/": b"" for i in range(99)}), "more than 16"),
    "traversal": (lambda files: zipped(files | {"../task.json": b"{}"}), "leads out"),
    "traversal in tar": (lambda files: tarred(files | {"x/../../task.json": b""}), "leads out"),
    "absolute": (lambda files: tarred({"/etc/task.json": b"{}"}), "leads out|missing"),
    "backslash": (lambda files: zipped({"..\\task.json": b"{}"}), "leads out"),
    "drive": (lambda files: zipped({"C:/task.json": b"{}"}), "leads out"),
    "link in tar": (
        lambda files: tarred({}, "w:gz", special("task.json", tarfile.SYMTYPE, "/etc/passwd")),
        "link or a device",
    ),
    "hard link": (
        lambda files: tarred(files, "w:", special("README.md", tarfile.LNKTYPE, "task.json")),
        "link or a device",
    ),
    "device": (lambda files: tarred({}, "w:", special("task.json", tarfile.CHRTYPE)), "device"),
    "fifo": (lambda files: tarred({}, "w:", special("task.json", tarfile.FIFOTYPE)), "device"),
    "link in zip": (zip_link, "link or a device"),
    "pickle": (lambda files: zipped(files | {"adapter_model.bin": b"\x80\x04."}), "run code"),
    "code": (lambda files: zipped(files | {"model.py": b"import os"}), "not part of an adapter"),
    "two folders": (
        lambda files: zipped(files | {"y/task.json": files["task.json"]}),
        "several folders",
    ),
    "twice": (twice, "twice"),
    "encrypted": (encrypted, "encrypted"),
    "bzip2 in zip": (lambda files: zipped(files, compression=zipfile.ZIP_BZIP2), "packed in a way"),
    "no weights": (lambda files: zipped({"task.json": b"{}"}), "adapter_config.json is missing"),
    "weights cut": (
        lambda files: zipped(
            files | {"adapter_model.safetensors": files["adapter_model.safetensors"][:-8]}
        ),
        "not a whole safetensors file",
    ),
}


@pytest.mark.parametrize("sort", BROKEN)
def test_what_is_refused(files: dict[str, bytes], sort: str) -> None:
    write, words = BROKEN[sort]
    with pytest.raises(AdapterError, match=words):
        unpack(write(files), LIMIT if sort != "large card" else 200_000)


@pytest.mark.parametrize(
    "weights",
    [
        b"",
        b"\xff" * 8,
        struct.pack("<Q", 2) + b"{}" + b"more",
        struct.pack("<Q", 1 << 60) + b"{}",
        struct.pack("<Q", 4) + b"[[]]",
        struct.pack("<Q", 9) + b'{"a": 1 }',
        struct.pack("<Q", 40) + json.dumps({"a": {"data_offsets": [0, -8]}}).ljust(40).encode(),
    ],
)
def test_headers(weights: bytes) -> None:
    with pytest.raises(AdapterError, match="not a whole safetensors file"):
        check_header(weights)


def test_a_header_that_would_keep_the_server_busy() -> None:
    weights = (2_000_000).to_bytes(8, "little") + b"{" * 3_000_000
    with pytest.raises(AdapterError, match="header of 2,000,000 bytes, and 1,000,000 are the most"):
        check_header(weights)

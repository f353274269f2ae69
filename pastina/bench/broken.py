"""Archives that are not adapters, of many sorts and as many as are wanted, each from a seed."""

import bz2
import gzip
import io
import json
import lzma
import random
import struct
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping

import torch
from safetensors.torch import load, save

from pastina.files import CARD, CONFIG, WEIGHTS

Files = Mapping[str, bytes]
MARK = "pastina-escaped"  # in the name of each file that would come to lie elsewhere
_TEMP = tempfile.gettempdir()  # where an archive that breaks out would write
_BOMB = 60_000_000  # bytes that nobody should unpack


def broken_archives(files: Files, count: int, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """So many archives, each with the name of its sort; files: of a good adapter."""
    sorts = list(SORTS)
    for number in range(count):
        sort = sorts[number % len(sorts)]
        draw = random.Random(f"{seed} {number}")
        yield sort, SORTS[sort](dict(files), draw)


def packed(files: Files) -> bytes:
    """A zip of these files."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()


def _tar(files: Files, *more: tarfile.TarInfo) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for info in more:
            archive.addfile(info)
    return out.getvalue()


def _pressed(content: bytes, draw: random.Random) -> bytes:
    press: Callable[[bytes], bytes] = draw.choice([gzip.compress, bz2.compress, lzma.compress])
    return press(content)


def _elsewhere(draw: random.Random) -> str:
    """A path that leads out of a folder."""
    start = draw.choice(
        [
            "../" * draw.randint(1, 9),
            "/",
            f"{_TEMP}/",
            "x/../../",
            "./../",
            "..\\" * 3,
            "C:\\",
            "//",
        ]
    )
    return start + draw.choice([f"{MARK}.json", f"{MARK}/task.json", f"{MARK}/{WEIGHTS}"])


def _special(draw: random.Random, kinds: list[bytes]) -> bytes:
    info = tarfile.TarInfo(draw.choice([CARD, WEIGHTS, "README.md", MARK]))
    info.type = draw.choice(kinds)
    info.linkname = draw.choice(["/etc/passwd", "../" * 5 + MARK, f"{_TEMP}/{MARK}", CARD])
    return _pressed(_tar({}, info), draw)


def _zip_link(files: Files, draw: random.Random) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in files.items():
            info = zipfile.ZipInfo(name)
            if name in (CONFIG, draw.choice([CARD, WEIGHTS])):
                info.external_attr = 0o120777 << 16
                content = f"{_TEMP}/{MARK}".encode()
            archive.writestr(info, content)
    return out.getvalue()


def _cut(files: Files, draw: random.Random) -> bytes:
    own = {name: files[name] for name in (CARD, CONFIG, WEIGHTS)}  # what is missing is needed
    way = draw.choice(["zip", "tar", "pressed"])
    content = packed(own) if way == "zip" else _tar(own).rstrip(b"\0")
    content = _pressed(content, draw) if way == "pressed" else content
    return content[: draw.randrange(len(content) * 9 // 10)]


def _flipped(files: Files, draw: random.Random) -> bytes:
    """Some bits are wrong; in the weights that does not stay unseen, for the digest tells."""
    content = bytearray(packed(files))
    for _ in range(draw.randint(8, 200)):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    return bytes(content)


_BOMBS: dict[tuple[str, str], bytes] = {}  # they take a while to make


def _bomb(files: Files, draw: random.Random) -> bytes:
    name, way = draw.choice([CARD, CONFIG, WEIGHTS]), draw.choice(["zip", "tar"])
    if (name, way) not in _BOMBS:
        large = {**files, name: b"\0" * _BOMB}
        _BOMBS[name, way] = packed(large) if way == "zip" else gzip.compress(_tar(large), 1)
    return _BOMBS[name, way]


def _header_bomb(files: Files, draw: random.Random) -> bytes:
    field = draw.choice(["comment", "path"])
    if ("header", field) not in _BOMBS:
        out = io.BytesIO()
        form = tarfile.PAX_FORMAT
        with tarfile.open(fileobj=out, mode="w:gz", format=form, compresslevel=1) as own:
            info = tarfile.TarInfo(CARD)
            info.pax_headers = {field: "x" * _BOMB}
            own.addfile(info)
        _BOMBS["header", field] = out.getvalue()
    return _BOMBS["header", field]


def _many(files: Files, draw: random.Random) -> bytes:
    return packed({f"{draw.random()}/{CARD}": b"{}" for _ in range(draw.randint(17, 3000))})


def _pickle(files: Files, draw: random.Random) -> bytes:
    import os
    import pickle

    class Code:
        def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
            return os.system, (f"touch {_TEMP}/{MARK}",)

    content = pickle.dumps(Code())
    name = draw.choice(["adapter_model.bin", "training_args.bin", "head.pkl", "x.pt", WEIGHTS])
    return packed({**files, name: content})


def _tensors(change: Callable[[torch.Tensor, random.Random], torch.Tensor]) -> "Sort":
    def write(files: Files, draw: random.Random) -> bytes:
        tensors = load(files[WEIGHTS])
        names = draw.sample(list(tensors), draw.randint(1, len(tensors)))
        tensors |= {name: change(tensors[name], draw).contiguous() for name in names}
        return packed(_sealed({**files, WEIGHTS: save(tensors)}))

    return write


def _sealed(files: dict[str, bytes]) -> dict[str, bytes]:
    """With the digest that belongs to these files, so that it is not what gives them away."""
    from pastina.adapter import Card, _digest_of

    card = Card.model_validate_json(files[CARD])
    digest = _digest_of(files[WEIGHTS], files[CONFIG], card)
    text = card.model_copy(update={"digest": digest}).model_dump_json()
    return {**files, CARD: text.encode()}


def _poison(tensor: torch.Tensor, draw: random.Random) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[draw.randrange(tensor.numel())] = draw.choice([float("nan"), float("inf")])
    return tensor


_WRONG = (torch.int64, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.int16)


def _shape(tensor: torch.Tensor, draw: random.Random) -> torch.Tensor:
    return draw.choice(
        [tensor[:0], tensor.unsqueeze(0), tensor.repeat(2, *[1] * (tensor.dim() - 1))]
    )


def _card(files: Files, draw: random.Random) -> bytes:
    values = json.loads(files[CARD])
    key = draw.choice(list(values))
    values[key] = draw.choice([None, -1, 10**30, "x" * 1000, [], {}, [[[]]], {"a": {}}, 1e308])
    text = draw.choice(
        [
            json.dumps(values),
            json.dumps(values)[: draw.randrange(1, 300)],
            "[" * draw.randint(1, 200_000),
            '{"format": NaN}',
            "\ufeff{}",
            "null",
        ]
    )
    return packed({**files, CARD: text.encode()})


def _config(files: Files, draw: random.Random) -> bytes:
    values = json.loads(files[CONFIG])
    key = draw.choice(["peft_type", "special_token_ids", "num_slots", "layers", "share"])
    values[key] = draw.choice([None, -1, 2**70, "x", [], [-1], [0, 0], [10**9], {}, True])
    if values == json.loads(files[CONFIG]):
        values["peft_type"] = "LORA"
    return packed({**files, CONFIG: json.dumps(values).encode()})


def _header(files: Files, draw: random.Random) -> bytes:
    size = draw.choice([0, 1, 8, 2**31, 2**63, 2**64 - 1])
    inner = draw.choice([b"{}", b"[]", b"{" * 5000, b'{"a":{"dtype":"F32","shape":[-1]}}', b"\xff"])
    return packed({**files, WEIGHTS: struct.pack("<Q", size) + inner})


def _noise(files: Files, draw: random.Random) -> bytes:
    start = draw.choice(
        [b"", b"PK\x03\x04", b"PK\x05\x06", b"\x1f\x8b\x08", b"BZh9", b"\xfd7zXZ\0"]
    )
    return start + draw.randbytes(draw.randrange(4000))


def _without(files: Files, draw: random.Random) -> bytes:
    missing = draw.choice([CARD, CONFIG, WEIGHTS])
    return packed({name: content for name, content in files.items() if name != missing})


Sort = Callable[[Files, random.Random], bytes]
SORTS: dict[str, Sort] = {
    "noise": _noise,
    "cut": _cut,
    "wrong bits": _flipped,
    "bomb": _bomb,
    "bomb in a header": _header_bomb,
    "too many entries": _many,
    "traversal in zip": lambda files, draw: packed({**files, _elsewhere(draw): b"{}"}),
    "traversal in tar": lambda files, draw: _pressed(
        _tar({**files, _elsewhere(draw): b"{}"}), draw
    ),
    "symbolic link": lambda files, draw: _special(draw, [tarfile.SYMTYPE]),
    "hard link": lambda files, draw: _special(draw, [tarfile.LNKTYPE]),
    "device or pipe": lambda files, draw: _special(
        draw, [tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE]
    ),
    "link in zip": _zip_link,
    "pickle": _pickle,
    "not finite": _tensors(_poison),
    "wrong dtype": _tensors(lambda tensor, draw: tensor.to(draw.choice(_WRONG))),
    "wrong shape": _tensors(_shape),
    "card": _card,
    "config": _config,
    "header of the weights": _header,
    "a file is missing": _without,
}

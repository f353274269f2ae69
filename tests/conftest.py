import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny backbone by name, saved once: see tests/adapter_folder.py."""
    from tests.adapter_folder import family_folder

    root = tmp_path_factory.mktemp("backbones")

    def folder(name: str) -> Path:
        path = root / name
        return path if path.is_dir() else family_folder(name, path)

    return folder


@pytest.fixture(scope="session")
def bert(backbones: Callable[[str], Path]) -> Path:
    return backbones("bert")


@pytest.fixture
def toy(bert: Path, tmp_path: Path) -> Callable[..., Any]:
    """A recipe for a toy task of a kind ("pair" is classify on pairs), on the tiny BERT.

    Keyword arguments are its sections; rows and dev_rows say how much data there is.
    """
    from tests.backbone_folder import toy_recipe

    def make(kind: str = "classify", **sections: Any) -> Any:
        return toy_recipe(bert, tmp_path, kind, **sections)

    return make

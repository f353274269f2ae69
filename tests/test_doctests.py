"""The examples in docstrings say what happens."""

import doctest
import importlib
from pathlib import Path

import pytest

import pastina

ROOT = Path(pastina.__file__).parent
MODULES = sorted(
    ".".join(("pastina", *path.relative_to(ROOT).with_suffix("").parts))
    for path in ROOT.rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted > 0
    assert found.failed == 0

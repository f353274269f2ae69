"""Tells PEFT of our methods: at once if PEFT is loaded, else when it is.

Importing PEFT takes seconds, which `pastina --help` should not cost.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def register_with_peft() -> None:
    """After this, `peft` knows "PASTA" and the others from its first use on."""
    if "peft" in sys.modules:
        importlib.import_module("pastina.methods")
    elif not any(isinstance(finder, _WhenPeftLoads) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenPeftLoads())


class _WhenPeftLoads(MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "peft":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("peft")
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


class _ThenRegister(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        importlib.import_module("pastina.methods")

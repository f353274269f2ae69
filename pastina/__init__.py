"""pastina: one frozen transformer, thousands of tasks.

The public names load on first use, so that `pastina --help` does not wait for torch. PEFT learns our
methods as soon as it is imported, before or after pastina.
"""

import importlib
from typing import TYPE_CHECKING, Any

from pastina import _register

if TYPE_CHECKING:
    from pastina.adapter import Card as Card
    from pastina.adapter import list_adapters as list_adapters
    from pastina.answers import Prediction as Prediction
    from pastina.client import Client as Client
    from pastina.errors import PastinaError as PastinaError
    from pastina.looking.look import look as look
    from pastina.looking.records import Look as Look
    from pastina.methods import BitFitConfig as BitFitConfig
    from pastina.methods import BottleneckConfig as BottleneckConfig
    from pastina.methods import FullConfig as FullConfig
    from pastina.methods import LinearConfig as LinearConfig
    from pastina.methods import PastaConfig as PastaConfig
    from pastina.predict import Predictor as Predictor
    from pastina.predict import load as load
    from pastina.recipe import Recipe as Recipe
    from pastina.recipe import read_recipe as read_recipe
    from pastina.spans import Span as Span
    from pastina.tasks import Tasks as Tasks
    from pastina.training.evaluate import evaluate as evaluate
    from pastina.training.fit import Run as Run
    from pastina.training.fit import train as train
    from pastina.training.fleet import train_fleet as train_fleet
    from pastina.training.tune import tune as tune

__version__ = "0.1.0"

_HOME = {
    "Card": "adapter",
    "list_adapters": "adapter",
    "Prediction": "answers",
    "Client": "client",
    "PastinaError": "errors",
    "look": "looking.look",
    "Look": "looking.records",
    "BitFitConfig": "methods",
    "BottleneckConfig": "methods",
    "FullConfig": "methods",
    "LinearConfig": "methods",
    "PastaConfig": "methods",
    "Predictor": "predict",
    "load": "predict",
    "Recipe": "recipe",
    "read_recipe": "recipe",
    "Span": "spans",
    "Tasks": "tasks",
    "evaluate": "training.evaluate",
    "Run": "training.fit",
    "train": "training.fit",
    "train_fleet": "training.fleet",
    "tune": "training.tune",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'pastina' has no attribute {name!r}")
    return getattr(importlib.import_module(f"pastina.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOME]


_register.register_with_peft()

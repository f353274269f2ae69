"""What a group of measurements is given, and what it gives back."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pastina.backbones import BackboneFiles, find_backbone
from pastina.data.read import read_rows
from pastina.recipe import BackboneSpec, DataSpec, Recipe, make_recipe

SETS: dict[str, dict[str, str]] = {
    "clinc150": {"train": "train.jsonl", "dev": "dev.jsonl", "test": "test.jsonl"},
    "qnli": {"train": "train.jsonl", "test": "test.jsonl"},
}


@dataclass(frozen=True, slots=True)
class Size:
    """How much is measured; it stands in the result file.

    repetitions: of each figure. rounds: calls in one repetition of what takes milliseconds.
    train_rows, texts: at most so many of a set, None: all. steps: timed in one repetition, after
    warm_steps. The curves begin at a light load; the last number of each is its heaviest.
    """

    repetitions: int = 5
    rounds: int = 20
    batch: int = 32
    train_rows: int | None = None
    steps: int = 12
    warm_steps: int = 2
    gemm_rows: int = 2048
    texts: int | None = None
    mixed_tasks: int = 64
    resident_tasks: int = 1000
    fleet: int = 16
    fleet_rows: int = 4000
    fleet_epochs: int = 1
    curve_lengths: tuple[int, ...] = (8, 16, 32, 64, 128, 256, 512)
    curve_batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
    curve_mixed: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    curve_resident: tuple[int, ...] = (1, 10, 100, 1000)


FULL = Size()
QUICK = Size(
    repetitions=2,
    rounds=2,
    train_rows=320,
    steps=2,
    warm_steps=1,
    gemm_rows=256,
    texts=64,
    mixed_tasks=8,
    resident_tasks=20,
    fleet=2,
    fleet_rows=160,
    fleet_epochs=1,
    curve_lengths=(8, 32),
    curve_batches=(1, 8),
    curve_mixed=(1, 8),
    curve_resident=(1, 10),
)


@dataclass(frozen=True)
class Work:
    """Where a group works. tick: to be called after each piece of work, with all pieces there are."""

    size: Size
    backbone: str
    data: Path
    scratch: Path
    tick: Callable[[int], None]

    @cached_property
    def files(self) -> BackboneFiles:
        """The backbone on this machine."""
        return find_backbone(BackboneSpec(name=self.backbone))

    def recipe(self, name: str, **sections: Any) -> Recipe:
        """The recipe of a set, as in recipes/minilm; keywords change its sections."""
        data = {"folder": str(self.data / name), "limit": self.size.train_rows, **SETS[name]}
        values = {
            "name": name,
            "kind": "classify",
            "backbone": {"name": self.backbone},
            "data": data | sections.pop("data", {}),
            "fit": {"batch": self.size.batch} | sections.pop("fit", {}),
        }
        return make_recipe(values | sections).resolved()

    @cached_property
    def test_texts(self) -> Sequence[str]:
        """The texts of CLINC150's test file; their labels are not looked at."""
        path = self.data / "clinc150" / SETS["clinc150"]["test"]
        rows = read_rows(path, "classify", DataSpec())
        return [row.text for row in rows[: self.size.texts]]

    @cached_property
    def adapter(self) -> Path:
        """An adapter for CLINC150's classes that reads [CLS], trained for a moment."""
        from pastina.training.fit import train

        data = {"limit": 320, "dev": None, "dev_share": 0.02}
        recipe = self.recipe("clinc150", data=data, fit={"epochs": 1}, head={"pooling": "cls"})
        return train(recipe, self.scratch / "clinc150").adapter


@dataclass(frozen=True, slots=True)
class Measured:
    """What a group found.

    figures: by key; None where one cannot be measured here, and `notes` says why. repetitions: by
    key, then by contestant, the numbers as they were measured, with their `unit`. curves: see
    curves.py.
    """

    figures: dict[str, float | None]
    repetitions: dict[str, dict[str, Any]]
    notes: dict[str, str] = field(default_factory=dict)
    curves: dict[str, Any] = field(default_factory=dict)

"""What a pass costs, against the length of rows, their number, and the number of tasks.

A curve: `axis` says what `x` counts, `seconds` holds for each series the median at each x.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from pastina.adapter import load_adapter
from pastina.backbones import max_positions
from pastina.bench.copies import write_copies
from pastina.bench.timing import in_turn, seconds, short
from pastina.bench.work import Measured, Work
from pastina.data.encode import Example
from pastina.engine import Engine, make_engine
from pastina.engine.batching import Batch, collate
from pastina.engine.reference import ReferenceEngine
from pastina.methods import train_mode
from pastina.tasks import Tasks
from pastina.training.events import ignore
from pastina.training.prepare import Prepared, prepare

OURS, OTHERS = "pastina", "transformers with hooks"
FORWARD, STEP = "forward", "training step"
_ROWS, _LENGTH = 8, 32  # of the batch whose length grows, and of the rows whose number grows
_MIXED_ROWS = 64

Contestants = Mapping[str, Callable[[int], float]]


def measure_curves(work: Work) -> Measured:
    """Forward and training step in fp32 by our engine and by the model's own forward with hooks."""
    size = work.size
    passes = Passes(prepare(work.recipe("clinc150", data={"limit": 320}), ignore))
    lengths = [n for n in size.curve_lengths if n <= passes.longest]
    curves = {
        "length": (
            f"tokens in a row, {_ROWS} rows",
            [(n, passes.contestants(_ROWS, n)) for n in lengths],
        ),
        "batch": (
            f"rows in a batch, {_LENGTH} tokens each",
            [(n, passes.contestants(n, _LENGTH)) for n in size.curve_batches],
        ),
        "mixed": (f"tasks in a batch, {_MIXED_ROWS} texts", _mixed(work, size.curve_mixed)),
        "resident": (
            f"tasks in memory, {_MIXED_ROWS} texts of one task",
            _resident(work, size.curve_resident),
        ),
    }
    num_contestants = sum(len(own) for _, points in curves.values() for _, own in points)
    total = num_contestants * size.repetitions
    found, raw = {}, {}
    for name, (axis, points) in curves.items():
        found[name], raw[f"curve_{name}"] = _curve(
            axis, points, size.repetitions, lambda: work.tick(total)
        )
    return Measured({}, raw, curves=found)


def _curve(
    axis: str,
    points: Sequence[tuple[int, Contestants]],
    repetitions: int,
    tick: Callable[[], None],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The curve, and the numbers it was made of; all points have their turn in each repetition."""
    flat = {(name, x): run for x, contestants in points for name, run in contestants.items()}
    for run in flat.values():
        run(-1)
    raw: dict[str, list[list[float]]] = {}
    for (name, _), numbers in in_turn(flat, repetitions, tick).items():
        raw.setdefault(name, []).append(numbers)
    x = [place for place, _ in points]
    medians = {name: [short(median(n)) for n in numbers] for name, numbers in raw.items()}
    return {"axis": axis, "x": x, "seconds": medians}, {"unit": "seconds", "x": x, **raw}


class Passes:
    """Passes over rows of random tokens through one model, by two engines."""

    def __init__(self, run: Prepared) -> None:
        self.run = run
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = run.model.to(self.device)
        self.engines: dict[str, Engine] = {
            OURS: make_engine(self.model, precision="fp32"),
            OTHERS: ReferenceEngine(self.model),
        }
        self.optimizer = torch.optim.AdamW(run.trained().values(), lr=1e-4)

    @property
    def longest(self) -> int:
        """How many tokens the backbone reads."""
        return max_positions(self.run.backbone.model) or 1 << 20

    def contestants(self, num_rows: int, length: int) -> Contestants:
        """Seconds of a forward and of a training step, by engine."""
        batch = self._batch(num_rows, length)
        passes = {FORWARD: self._forward, STEP: self._step}
        return {
            f"{name}, {what}": lambda turn, run=run, engine=engine: run(engine, batch)
            for what, run in passes.items()
            for name, engine in self.engines.items()
        }

    def _batch(self, num_rows: int, length: int) -> Batch:
        tokenizer = self.run.backbone.tokenizer
        draw = random.Random(f"{num_rows} {length}")
        special = set(tokenizer.all_special_ids)
        usual = [i for i in range(min(len(tokenizer), 20000)) if i not in special]
        first, last = tokenizer.cls_token_id, tokenizer.sep_token_id
        types = None if self.run.examples[0].token_type_ids is None else [0] * length
        examples = [
            Example(
                row=row,
                input_ids=[first, *draw.choices(usual, k=length - 2), last],
                token_type_ids=types,
                target=draw.randrange(len(self.run.data.labels)),
                word_tokens=None,
                word_index=None,
                truncated=False,
            )
            for row in range(num_rows)
        ]
        return collate(examples, self.run.pad_id).to(self.device)

    def _forward(self, engine: Engine, batch: Batch) -> float:
        self.model.eval()
        with torch.inference_mode():
            return seconds(lambda: engine.logits(batch))

    def _step(self, engine: Engine, batch: Batch) -> float:
        train_mode(self.model)
        return seconds(lambda: self._train(engine, batch))

    def _train(self, engine: Engine, batch: Batch) -> None:
        assert batch.targets is not None
        self.run.kind.loss(engine.logits(batch), batch.targets, None).mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def _mixed(work: Work, counts: Sequence[int]) -> list[tuple[int, Contestants]]:
    """Texts to answers, by our tasks and by PEFT's `adapter_names` with our method."""
    folder = work.scratch / "curve_mixed"
    # PEFT wants heads of one size in a batch
    folders = write_copies(work.adapter, folder, max(counts), classes=(4,))
    texts = _texts(work)
    tasks, hooked = Tasks(work.backbone, precision="fp32"), _Hooked(folders)
    for path in folders:
        tasks.add(path)
    points = []
    for count in counts:
        names = [folders[i % count].name for i in range(len(texts))]
        both = list(zip(names, texts, strict=True))
        points.append(
            (
                count,
                {
                    f"{OURS}, {FORWARD}": lambda turn, b=both: seconds(lambda: tasks.predict(b)),
                    f"{OTHERS}, {FORWARD}": lambda turn, n=names: seconds(
                        lambda: hooked.predict(n, texts)
                    ),
                },
            )
        )
    return points


def _resident(work: Work, counts: Sequence[int]) -> list[tuple[int, Contestants]]:
    folders = write_copies(work.adapter, work.scratch / "curve_resident", max(counts))
    batch = [(folders[0].name, text) for text in _texts(work)]
    points = []
    for count in counts:
        tasks = Tasks(work.backbone, precision="fp32")
        for path in folders[:count]:
            tasks.add(path)
        points.append(
            (
                count,
                {
                    f"{OURS}, {FORWARD}": lambda turn, tasks=tasks: seconds(
                        lambda: tasks.predict(batch)
                    )
                },
            )
        )
    return points


def _texts(work: Work) -> list[str]:
    texts = list(work.test_texts[:_MIXED_ROWS])
    return [texts[i % len(texts)] for i in range(_MIXED_ROWS)]


class _Hooked:
    """Adapters side by side in one PeftModel."""

    def __init__(self, folders: Sequence[Path]) -> None:
        first = load_adapter(folders[0])
        self.tokenizer = first.backbone.tokenizer
        self.model = first.model
        self.names = {folders[0].name: "default"}
        for folder in folders[1:]:
            self.model.load_adapter(str(folder), adapter_name=folder.name)
            self.names[folder.name] = folder.name
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model.eval().to(self.device)

    @torch.inference_mode()
    def predict(self, names: Sequence[str], texts: Sequence[str]) -> list[int]:
        inputs = self.tokenizer(list(texts), padding=True, return_tensors="pt")
        inputs = inputs.to(self.device)
        own = [self.names[name] for name in names]
        return self.model(**inputs, adapter_names=own).logits.argmax(1).tolist()

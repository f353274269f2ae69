"""Training speed: pastina's own step against transformers.Trainer with LoRA, and against the floor.

Shape letters: M rows of a product, K inputs, N outputs; H hidden, I intermediate, L layers.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from pastina.bench.peers import LoraTrainer
from pastina.bench.timing import Raw, in_turn, ratio, seconds
from pastina.bench.work import Measured, Size, Work
from pastina.data.encode import Example
from pastina.engine.batching import training_batches
from pastina.errors import DataError
from pastina.methods import train_mode
from pastina.methods.layers import find_layers
from pastina.recipe import Recipe
from pastina.training.accelerated import accelerated
from pastina.training.events import ignore
from pastina.training.loop import Loop
from pastina.training.prepare import Source, prepare

_EPOCHS = 1000  # of a run that only lends its steps: its rate shall not fall to nothing meanwhile
TRAINER = "trainer_lora"


class Steps:
    """The training step of a run, over rows that are given."""

    def __init__(
        self, recipe: Recipe, folder: Path, accelerator: Any, source: Source | None = None
    ) -> None:
        self.run = prepare(recipe, ignore, source)
        self.loop = Loop(self.run, folder, ignore, accelerator)
        self.lengths = [len(example.input_ids) for example in self.run.examples]
        train_mode(self.run.model)

    def train(self, rows: Sequence[int], turn: int, warm_rows: int) -> float:
        """Seconds for one pass over the rows, as an epoch of them would be; the first do not count."""
        self._pass(rows[:warm_rows], turn)
        return seconds(lambda: self._pass(rows[warm_rows:], turn))

    def _pass(self, rows: Sequence[int], turn: int) -> None:
        fit, lengths = self.run.recipe.fit, [self.lengths[row] for row in rows]
        for batch in training_batches(lengths, fit.batch, seed=fit.seed, epoch=turn):
            self.loop.step([rows[place] for place in batch])


def draw_rows(num_rows: int, size: Size, turn: int) -> list[int]:
    """The rows of one repetition, the same for all: those of the warm steps, then those that count."""
    wanted = (size.warm_steps + size.steps) * size.batch
    if wanted > num_rows:
        raise DataError(
            f"The training set has {num_rows} rows, and {wanted} are needed for "
            f"{size.warm_steps + size.steps} steps of {size.batch}. Name another folder with --data."
        )
    return random.Random(f"rows {turn}").sample(range(num_rows), wanted)


def race(
    recipes: Mapping[str, Recipe],
    size: Size,
    scratch: Path,
    after_each: Callable[[], None],
    *,
    is_bf16: bool = False,
) -> Raw:
    """Examples/s of the steps of these recipes, which share their rows, and of transformers.Trainer.

    is_bf16: the Trainer's mixed precision.
    """
    source = Source(is_shared=True)
    with accelerated(next(iter(recipes.values())), scratch) as accelerator:
        ours = {n: Steps(recipe, scratch, accelerator, source) for n, recipe in recipes.items()}
        run = next(iter(ours.values())).run
        trainer = LoraTrainer(
            run.backbone.files.folder,
            run.backbone.tokenizer,
            len(run.data.labels),
            batch=size.batch,
            scratch=scratch,
            is_bf16=is_bf16,
        )
        rate = size.steps * size.batch

        def theirs(turn: int) -> float:
            rows = draw_rows(len(run.examples), size, turn)
            examples = [run.examples[row] for row in rows]
            return rate / trainer.train(examples, size.batch, size.warm_steps)

        def own(steps: Steps) -> Callable[[int], float]:
            warm = size.warm_steps * size.batch
            return lambda turn: (
                rate / steps.train(draw_rows(len(run.examples), size, turn), turn, warm)
            )

        contestants = {TRAINER: theirs, **{name: own(steps) for name, steps in ours.items()}}
        for contestant in contestants.values():
            contestant(-1)  # the first time of everything
        return in_turn(contestants, size.repetitions, after_each)


def measure_training(work: Work, name: str) -> Measured:
    """Examples/s on a set in each precision, over transformers.Trainer's in fp32.

    The head reads [CLS], as the Trainer's classifier does; "_mean": it reads the mean of all tokens.
    """
    recipes = {
        f"{precision}{suffix}": in_precision(
            work.recipe(name, head={"pooling": pooling}), precision
        )
        for suffix, pooling in (("", "cls"), ("_mean", "mean"))
        for precision in ("fp32", "int8", "bf16")
    }
    total = (len(recipes) + 1) * work.size.repetitions
    raw = race(recipes, work.size, work.scratch, lambda: work.tick(total))
    figures, repetitions = {}, {}
    for own in recipes:
        key = f"train_{name}_{own}"
        figures[key] = ratio(raw[own], raw[TRAINER])
        repetitions[key] = {
            "unit": "examples/s",
            f"pastina_{own}": raw[own],
            TRAINER: raw[TRAINER],
        }
    return Measured(figures, repetitions)


def measure_floor(work: Work) -> Measured:
    """The share of the fp32 floor that the step for a [CLS] head reaches on QNLI."""
    total = 2 * work.size.repetitions
    recipe = work.recipe("qnli", head={"pooling": "cls"})
    raw = race_floor(recipe, "fp32", work.size, work.scratch, lambda: work.tick(total))
    key = "train_floor_share_qnli"
    return Measured(
        {key: ratio(raw["floor"], raw["pastina_fp32"])}, {key: {"unit": "seconds", **raw}}
    )


def race_floor(
    recipe: Recipe,
    precision: Literal["fp32", "bf16"],
    size: Size,
    scratch: Path,
    after_each: Callable[[], None],
) -> Raw:
    """Seconds of the steps for a [CLS] head, and of their floor at the machine's own rate."""
    with accelerated(recipe, scratch) as accelerator:
        steps = Steps(in_precision(recipe, precision), scratch, accelerator)
        examples, backbone = steps.run.examples, steps.run.backbone.model
        warm = size.warm_steps * size.batch
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        rate = gemm_rate(backbone, size.gemm_rows, dtype)

        def rows(turn: int) -> list[int]:
            return draw_rows(len(examples), size, turn)

        def floor(turn: int) -> float:
            return floor_flops(backbone, [examples[row] for row in rows(turn)[warm:]]) / rate()

        contestants = {
            "floor": floor,
            f"pastina_{precision}": lambda turn: steps.train(rows(turn), turn, warm),
        }
        for contestant in contestants.values():
            contestant(-1)
        return in_turn(contestants, size.repetitions, after_each)


def in_precision(recipe: Recipe, precision: str) -> Recipe:
    """The recipe of a run that only lends its steps, in this precision."""
    fit = recipe.fit.model_copy(update={"precision": precision, "epochs": _EPOCHS})
    return recipe.model_copy(update={"fit": fit})


# ---------------------------------------------------------------------------------------------------
# The floor


def floor_flops(backbone: Any, examples: Sequence[Example]) -> float:
    """Floating point operations that a training step for a [CLS] head cannot do without."""
    linears = _linears(backbone)
    hidden, num_layers = backbone.config.hidden_size, backbone.config.num_hidden_layers
    inner = max(max(linear.weight.shape) for linear in linears)
    lengths = [len(example.input_ids) for example in examples]
    products = 2 * sum(linear.weight.numel() for linear in linears) * sum(lengths)
    attention = 4 * hidden * num_layers * sum(length**2 for length in lengths)
    return floor_forwards(num_layers, hidden, inner) * (products + attention)


def floor_forwards(num_layers: int, hidden: int, inner: int) -> float:
    """The floor in forwards. The last layer needs keys and values of all tokens, all else of [CLS];
    the first layer's input gradient is needed at the special tokens only.

    >>> round(floor_forwards(6, 384, 1536), 2)
    1.68
    """
    layer = 4 * hidden * hidden + 2 * hidden * inner
    last = 2 * hidden * hidden / layer
    first = 1 - 3 * hidden * hidden / layer
    ahead, back = num_layers - 1 + last, num_layers - 2 + last + first
    return (ahead + back) / num_layers


def gemm_rate(backbone: Any, num_rows: int, dtype: torch.dtype) -> Callable[[], float]:
    """What measures the FLOP/s of this machine in products of the layers' shapes."""
    device = backbone.device
    generator = torch.Generator(device).manual_seed(0)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    shapes = [(linear.out_features, linear.in_features) for linear in _linears(backbone)]
    tensors = {
        (n, k): (numbers(num_rows, k), numbers(n, k), numbers(num_rows, n)) for n, k in set(shapes)
    }
    flops = 2 * num_rows * sum(n * k for n, k in shapes)

    def multiply() -> None:
        for shape in shapes:
            x_MK, weight_NK, out_MN = tensors[shape]
            torch.mm(x_MK, weight_NK.t(), out=out_MN)

    def measure() -> float:
        multiply()
        return flops / seconds(multiply)

    return measure


def _linears(backbone: Any) -> list[nn.Linear]:
    """The linear layers inside the transformer's layers."""
    modules: Mapping[str, nn.Module] = dict(backbone.named_modules())
    found = find_layers(backbone)
    return [
        module
        for name in found.names
        for module in modules[name].modules()
        if isinstance(module, nn.Linear)
    ]

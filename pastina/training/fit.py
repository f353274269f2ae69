"""One run: a recipe in, an adapter out. Can be killed at any moment and resumed to the same bits."""

import json
import logging
import math
import os
import platform
import signal
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import pastina
from pastina.adapter import BackboneId, Card, save_adapter, size_on_disk
from pastina.backbones import Backbone, load_backbone, max_positions
from pastina.data.encode import Example, bio_tags, encode
from pastina.data.read import load_dataset
from pastina.data.rows import Dataset, Row
from pastina.engine import Engine, make_engine
from pastina.engine.batching import check_slots, collate, count_items, training_batches
from pastina.errors import BackboneError, PastinaError, RecipeError
from pastina.heads import TaskModel
from pastina.kinds import KINDS, LOWER_IS_BETTER, Kind, class_weights, main_metric
from pastina.methods import attach, train_mode
from pastina.recipe import Recipe, read_recipe, recipe_toml
from pastina.slots import special_ids, template_slots
from pastina.training.events import EpochEnd, Note, OnEvent, Step, ignore
from pastina.training.score import Scorer
from pastina.training.state import (
    load_state,
    random_state,
    restore_random_state,
    save_state,
    write_atomically,
)

logger = logging.getLogger("pastina")


class Stopped(PastinaError):
    """The run was asked to stop (Ctrl-C) and saved where it stands."""


@dataclass(frozen=True, slots=True)
class Run:
    """What a recipe produced. adapter: the folder to load; metrics: of the best epoch on dev."""

    folder: Path
    adapter: Path
    best_epoch: int
    metrics: dict[str, float]
    metric: str
    trained_parameters: int
    adapter_bytes: int
    seconds: float


@dataclass
class _Progress:
    """Everything that changes while a run goes on, apart from tensors."""

    epoch: int = 0
    batch: int = 0  # batches of this epoch that are done
    step: int = 0
    loss_sum: float = 0.0
    items: int = 0
    seconds: float = 0.0
    best: float = -math.inf
    best_epoch: int = 0
    is_done: bool = False
    history: list[dict[str, Any]] = field(default_factory=list)


def train(
    recipe: Recipe,
    out: str | Path,
    *,
    resume: bool = False,
    on_event: OnEvent = ignore,
) -> Run:
    """Train one adapter; `out` then holds adapter/, metrics.jsonl, recipe.toml and result.json.

    Raises:
        RecipeError: settings that do not fit the data; `out` is taken; nothing to resume.
        DataError: bad data. BackboneError: no such backbone. Stopped: Ctrl-C; resume later.
    """
    folder = Path(out)
    recipe = recipe.resolved()
    _check_folder(folder, recipe, resume)
    kind = KINDS[recipe.kind]
    data = load_dataset(recipe.kind, recipe.data, recipe.fit.seed)
    metric = main_metric(kind, recipe.fit.metric, data.labels)
    loop = _Loop(recipe, kind, data, metric, folder, on_event)
    with loop.accelerated():
        if resume:
            loop.restore()
        elif loop.is_main:
            write_atomically(folder / "recipe.toml", recipe_toml(recipe).encode())
        with _stop_on_signal() as is_asked_to_stop:
            loop.run(is_asked_to_stop)
        return loop.finish()


def resume_recipe(out: str | Path) -> Recipe:
    """The recipe of a run that was begun in this folder.

    Raises:
        RecipeError: no run was begun there.
    """
    path = Path(out) / "recipe.toml"
    if not path.is_file():
        raise RecipeError(f"There is nothing to resume in {out}: it holds no recipe.toml.")
    return read_recipe(path)


def _check_folder(folder: Path, recipe: Recipe, resume: bool) -> None:
    if resume:
        if resume_recipe(folder) != recipe:
            raise RecipeError(
                f"The run in {folder} was begun with another recipe. Resume it with its own "
                f"({folder / 'recipe.toml'}), or train into another folder."
            )
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RecipeError(
            f"{folder} exists and is not empty. Name another folder, or resume the run in it."
        )


class _Loop:
    """The state of one run: model, data, optimiser, progress."""

    def __init__(
        self,
        recipe: Recipe,
        kind: Kind,
        data: Dataset,
        metric: str,
        folder: Path,
        on_event: OnEvent,
    ) -> None:
        self.recipe, self.kind, self.data, self.metric = recipe, kind, data, metric
        self.folder, self.on_event = folder, on_event
        self.progress = _Progress()
        self.state_path = folder / "state" / "state.pt"
        wanted = recipe.head.pooling
        keep_pooler = None if wanted == "auto" else wanted == "pooler"
        if recipe.kind == "tag":
            keep_pooler = False
        self.backbone = load_backbone(recipe.backbone, keep_pooler=keep_pooler)
        self.pooling = _pooling(recipe, self.backbone)
        self._prepare_data()
        self.model = _build_model(
            recipe, kind, data, self.backbone, self.pooling, self.special_ids, self.num_slots
        )
        self.trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.best_tensors: dict[str, torch.Tensor] = {}

    def _prepare_data(self) -> None:
        spec, tokenizer = self.recipe.data, self.backbone.tokenizer
        limit = max_positions(self.backbone.model)
        if limit is not None and spec.max_length > limit:
            raise BackboneError(
                f"data.max_length = {spec.max_length}, but {self.recipe.backbone.name} reads at most "
                f"{limit} tokens. Lower data.max_length."
            )
        train_rows, (self.target_mean, self.target_std) = self.data.train, _target_scale(self.data)
        self.special_ids = special_ids(tokenizer)
        self.is_pair = any(row.text_pair is not None for row in self.data.train)
        self.num_slots = _num_slots(self.recipe, self.is_pair, self.backbone)
        self.examples = self._encode(train_rows)
        counts, num_items = _count_outputs(self.examples, self.kind, self.data.labels)
        self.weights = class_weights(
            self.kind, self.data.labels, self.recipe.fit.class_weights, counts, num_items
        )
        self.scorer = Scorer(
            self.kind,
            self.data.labels,
            self.data.dev,
            self._encode(self.data.dev),
            pad_id=tokenizer.pad_token_id,
            target_scale=(self.target_mean, self.target_std),
        )
        num_truncated = sum(example.truncated for example in self.examples)
        if num_truncated:
            self.on_event(
                Note(
                    f"{num_truncated} of {len(self.examples)} training texts are longer than "
                    f"data.max_length = {spec.max_length} tokens and were cut."
                )
            )

    def _encode(self, rows: Sequence[Row]) -> list[Example]:
        spec = self.recipe.data
        examples = encode(
            rows,
            self.backbone.tokenizer,
            self.recipe.kind,
            self.data.labels,
            max_length=spec.max_length,
            stride=spec.stride,
        )
        method = self.recipe.method
        if method.name == "pasta" and method.share == "none":
            check_slots(examples, rows, self.special_ids, self.num_slots)
        if self.recipe.kind == "regress":
            examples = [_scaled(e, self.target_mean, self.target_std) for e in examples]
        return examples

    @contextmanager
    def accelerated(self) -> Iterator[None]:
        """accelerate's side: device, processes, precision, trackers."""
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState, GradientState, PartialState

        fit = self.recipe.fit
        precision = fit.precision
        if precision == "auto":
            is_good = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
            precision = "bf16" if is_good else "fp32"
        self.accelerator = Accelerator(
            mixed_precision="bf16" if precision == "bf16" else "no",
            log_with=list(fit.report_to) or None,
            project_dir=str(self.folder),
        )
        self.is_main = self.accelerator.is_main_process
        self.optimizer = _optimizer(self.trained, self.model, self.recipe)
        self.wrapped, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        self.weights = None if self.weights is None else self.weights.to(self.accelerator.device)
        if fit.report_to:
            self.accelerator.init_trackers(self.recipe.name or self.folder.name)
        torch.manual_seed(fit.seed + self.accelerator.process_index)
        try:
            yield
        finally:
            self.accelerator.end_training()
            # accelerate keeps its settings for the life of the process; the next run has its own
            for state in (AcceleratorState, GradientState, PartialState):
                state._reset_state()

    @property
    def engine(self) -> Engine:
        if not hasattr(self, "_engine"):
            self._engine = make_engine(self.wrapped)
        return self._engine

    def run(self, is_asked_to_stop: Any) -> None:
        """All epochs that are left."""
        fit, progress = self.recipe.fit, self.progress
        lengths = [len(example.input_ids) for example in self.examples]
        steps_per_epoch = math.ceil(len(lengths) / fit.batch)
        self.total_steps = steps_per_epoch * fit.epochs
        self._last_saved = time.monotonic()
        while not progress.is_done:
            batches = training_batches(lengths, fit.batch, seed=fit.seed, epoch=progress.epoch)
            train_mode(self.model)
            while progress.batch < len(batches):
                self._step(batches[progress.batch])
                if is_asked_to_stop():
                    self._stop()
                if time.monotonic() - self._last_saved >= fit.save_seconds:
                    self._save()
            self._end_epoch()
            self._save()

    def _step(self, indices: list[int]) -> None:
        started = time.perf_counter()
        fit, progress, accelerator = self.recipe.fit, self.progress, self.accelerator
        share = _lr_share(progress.step, self.total_steps, fit.warmup, fit.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * share
        mine = indices[accelerator.process_index :: accelerator.num_processes]
        batch = collate(
            [self.examples[i] for i in mine or indices[:1]], self.backbone.tokenizer.pad_token_id
        ).to(accelerator.device)
        num_items = sum(count_items(self.examples[i]) for i in indices)
        with accelerator.autocast():
            logits = self.engine.logits(batch)
        losses = self.kind.loss(logits.float(), batch.targets, self.weights)
        # the mean over all processes' items; DDP averages gradients, hence the factor
        loss = losses.sum() * (accelerator.num_processes if mine else 0) / max(num_items, 1)
        value = float(accelerator.reduce(loss.detach(), "mean"))
        if not math.isfinite(value):
            raise PastinaError(
                f"The loss became {value} in epoch {progress.epoch + 1}, step {progress.step + 1}. "
                f"Lower fit.lr ({fit.lr}) or fit.head_lr ({fit.head_lr}). "
                "No adapter was written."
            )
        accelerator.backward(loss)
        if fit.clip:
            accelerator.clip_grad_norm_(self.trained.values(), fit.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        seconds = time.perf_counter() - started
        progress.step += 1
        progress.batch += 1
        progress.loss_sum += value * num_items
        progress.items += num_items
        progress.seconds += seconds
        self.on_event(
            Step(
                progress.step,
                self.total_steps,
                progress.epoch + 1,
                fit.epochs,
                value,
                len(indices) / seconds,
            )
        )

    def _end_epoch(self) -> None:
        started = time.perf_counter()
        progress, fit = self.progress, self.recipe.fit
        self.model.eval()
        metrics = self.scorer.score(self.engine, self.accelerator)
        worth = metrics[self.metric] * (-1 if self.metric in LOWER_IS_BETTER else 1)
        progress.epoch += 1
        is_best = worth > progress.best or not self.best_tensors
        if is_best:
            progress.best, progress.best_epoch = worth, progress.epoch
            self.best_tensors = {n: p.detach().cpu().clone() for n, p in self.trained.items()}
        loss = progress.loss_sum / max(progress.items, 1)
        progress.batch, progress.loss_sum, progress.items = 0, 0.0, 0
        progress.seconds += time.perf_counter() - started
        is_patient = fit.patience is None or progress.epoch - progress.best_epoch < fit.patience
        progress.is_done = progress.epoch == fit.epochs or not is_patient
        progress.history.append(
            {
                "epoch": progress.epoch,
                "step": progress.step,
                "loss": loss,
                "dev": metrics,
                "seconds": round(progress.seconds, 3),
            }
        )
        self.accelerator.log(
            {"loss": loss, **{f"dev/{name}": value for name, value in metrics.items()}},
            step=progress.step,
        )
        self._write_metrics()
        self.on_event(EpochEnd(progress.epoch, fit.epochs, loss, metrics, is_best))

    def _write_metrics(self) -> None:
        if self.is_main:
            lines = "".join(json.dumps(record) + "\n" for record in self.progress.history)
            write_atomically(self.folder / "metrics.jsonl", lines.encode())

    def _stop(self) -> None:
        self._save()
        raise Stopped(
            f"Stopped in epoch {self.progress.epoch + 1} after step {self.progress.step} of "
            f"{self.total_steps}. Go on with: pastina train --resume --out {self.folder}"
        )

    def _save(self) -> None:
        self._last_saved = time.monotonic()
        random_states = _gather(random_state(), self.accelerator)
        if self.is_main:
            save_state(
                self.state_path,
                {
                    "data": self.data.digest,
                    "backbone": self.backbone.files.digest,
                    "progress": {f: getattr(self.progress, f) for f in vars(self.progress)},
                    "trained": {name: p.detach().cpu() for name, p in self.trained.items()},
                    "best": self.best_tensors,
                    "optimizer": self.optimizer.state_dict(),
                    "random": random_states,
                },
            )

    def restore(self) -> None:
        """Go back to the last saved state, or to the start where none was saved yet."""
        if not self.state_path.is_file():
            return
        state = load_state(self.state_path)
        if state["data"] != self.data.digest or state["backbone"] != self.backbone.files.digest:
            what = "data" if state["data"] != self.data.digest else "backbone"
            raise RecipeError(
                f"The {what} changed since the run in {self.folder} was begun. Train again from "
                "the start in another folder."
            )
        self.progress = _Progress(**state["progress"])
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(state["trained"][name])
        self.best_tensors = state["best"]
        self.optimizer.load_state_dict(state["optimizer"])
        restore_random_state(state["random"][self.accelerator.process_index])
        self._write_metrics()

    def finish(self) -> Run:
        """Write the adapter of the best epoch and the result."""
        progress = self.progress
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(self.best_tensors[name])
        best = next(r for r in progress.history if r["epoch"] == progress.best_epoch)
        adapter = self.folder / "adapter"
        card = self._card(best["dev"])
        if self.is_main:
            self.model.eval()
            card = save_adapter(self.model, card, adapter)
            self._write_result(card)
        self.accelerator.wait_for_everyone()
        return Run(
            folder=self.folder,
            adapter=adapter,
            best_epoch=progress.best_epoch,
            metrics=best["dev"],
            metric=self.metric,
            trained_parameters=card.trained_parameters,
            adapter_bytes=size_on_disk(adapter),
            seconds=progress.seconds,
        )

    def _card(self, metrics: dict[str, float]) -> Card:
        files, spec = self.backbone.files, self.recipe.data
        return Card(
            name=self.recipe.name or self.folder.name,
            kind=self.recipe.kind,
            labels=tuple(self.data.labels),
            method=self.recipe.method.name,
            is_pair=self.is_pair,
            pooling=self.pooling,
            max_length=spec.max_length,
            stride=spec.stride,
            target_mean=self.target_mean,
            target_std=self.target_std,
            backbone=BackboneId(
                name=files.name,
                revision=files.revision,
                digest=files.digest,
                tokenizer_digest=files.tokenizer_digest,
            ),
            trained_parameters=sum(parameter.numel() for parameter in self.trained.values()),
            metrics={"dev": metrics},
            recipe=self.recipe.model_dump(mode="json"),
            versions=versions(),
        )

    def _write_result(self, card: Card) -> None:
        progress = self.progress
        result = {
            "metric": self.metric,
            "dev": card.metrics["dev"],
            "best_epoch": progress.best_epoch,
            "epochs": progress.epoch,
            "steps": progress.step,
            "seconds": round(progress.seconds, 2),
            "engine": self.engine.name,
            "trained_parameters": card.trained_parameters,
            "adapter_bytes": size_on_disk(self.folder / "adapter"),
            "adapter_digest": card.digest,
            "data_digest": self.data.digest,
            "rows": {part: len(getattr(self.data, part)) for part in ("train", "dev", "test")},
            "backbone": card.backbone.model_dump(),
            "seed": self.recipe.fit.seed,
            "recipe": card.recipe,
            "versions": card.versions,
            "machine": machine(),
        }
        write_atomically(
            self.folder / "result.json", (json.dumps(result, indent=1) + "\n").encode()
        )


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    import peft
    import transformers

    return {
        "pastina": pastina.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }


def machine() -> dict[str, Any]:
    """What a timing depends on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "system": platform.system(),
    }


def _build_model(
    recipe: Recipe,
    kind: Kind,
    data: Dataset,
    backbone: Backbone,
    pooling: str,
    ids: tuple[int, ...],
    num_slots: int,
) -> Any:
    task_model = TaskModel(
        backbone.model,
        len(kind.outputs(data.labels)),
        pooling=pooling,
        dropout=recipe.head.dropout,
        seed=recipe.fit.seed,
    )
    torch.manual_seed(recipe.fit.seed)  # the vectors' first values
    return attach(
        task_model,
        recipe.method,
        special_token_ids=ids,
        num_slots=num_slots,
        task_type=kind.task_type,
    )


def _pooling(recipe: Recipe, backbone: Backbone) -> str:
    if recipe.kind == "tag":
        if recipe.head.pooling != "auto":
            raise RecipeError(
                f"head.pooling = {recipe.head.pooling!r} means nothing for a tagger, which reads "
                "every word. Remove it."
            )
        return "tokens"
    return backbone.pooling if recipe.head.pooling == "auto" else recipe.head.pooling


def _num_slots(recipe: Recipe, is_pair: bool, backbone: Backbone) -> int:
    wanted = getattr(recipe.method, "num_slots", None)
    return wanted or template_slots(backbone.tokenizer, is_pair)


def _target_scale(data: Dataset) -> tuple[float, float]:
    values = [row.label for row in data.train if isinstance(row.label, float)]
    if not values:
        return 0.0, 1.0
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
    return mean, deviation or 1.0


def _scaled(example: Example, mean: float, deviation: float) -> Example:
    from dataclasses import replace

    return replace(example, target=(example.target - mean) / deviation)  # type: ignore[operator]


def _count_outputs(
    examples: Sequence[Example], kind: Kind, labels: Sequence[str]
) -> tuple[Counter[str], int]:
    """How often each output is the right one, and among how many items."""
    outputs = bio_tags(labels) if kind.name == "tag" else kind.outputs(labels)
    counts: Counter[str] = Counter()
    for example in examples:
        target: Any = example.target
        if kind.name == "classify":
            counts[outputs[target]] += 1
        elif kind.name == "tag":
            counts.update(outputs[tag] for tag in target)
        elif kind.name == "multilabel":
            counts.update(o for o, is_set in zip(outputs, target, strict=True) if is_set)
    return counts, sum(count_items(example) for example in examples)


def _optimizer(trained: dict[str, Any], model: Any, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW with one rate for what learns in the backbone and one for the head."""
    fit = recipe.fit
    groups: dict[tuple[float, float], list[Any]] = {}
    for name, parameter in trained.items():
        lr = fit.head_lr if ".classifier." in f".{name}" else fit.lr
        decay = fit.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((lr or 0.0, decay), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": members, "lr": lr, "base_lr": lr, "weight_decay": decay}
            for (lr, decay), members in groups.items()
        ],
        eps=fit.adam_eps,
    )


def _lr_share(step: int, total: int, warmup: float, schedule: str) -> float:
    """Which share of its full rate the optimiser takes at this step (from 0)."""
    warm = round(warmup * total)
    if step < warm:
        return (step + 1) / warm
    if schedule == "constant":
        return 1.0
    return (total - step) / max(total - warm, 1)


def _gather(value: Any, accelerator: Any) -> list[Any]:
    """One value of each process, in order."""
    if accelerator.num_processes == 1:
        return [value]
    from accelerate.utils import gather_object

    return gather_object([value])


@contextmanager
def _stop_on_signal() -> Iterator[Any]:
    """Ctrl-C and SIGTERM end the run after the step at hand; a second one ends it at once."""
    asked: list[int] = []

    def ask(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    try:
        before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals go elsewhere
        yield lambda: False
        return
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

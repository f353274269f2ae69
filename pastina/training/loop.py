"""The training loop: steps, epochs, and where the run stands on disk."""

import json
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from pastina.engine import Engine, RememberingEngine, make_engine
from pastina.engine.batching import Batch, collate, count_items, training_batches
from pastina.engine.encoder import Encoder
from pastina.engine.remember import Memory
from pastina.errors import PastinaError, RecipeError
from pastina.files import whole_file
from pastina.kinds import LOWER_IS_BETTER
from pastina.methods import train_mode
from pastina.recipe import FitSpec
from pastina.training.accelerated import gather
from pastina.training.average import Average
from pastina.training.events import EpochEnd, Note, OnEvent, Step, ignore
from pastina.training.objective import Objective
from pastina.training.prepare import Prepared, Source
from pastina.training.rates import lr_share, make_optimizer
from pastina.training.score import NotFinite
from pastina.training.state import load_state, random_state, restore_random_state, save_state


class Stopped(PastinaError):
    """The run was asked to stop (Ctrl-C) and saved where it stands."""


@dataclass
class Progress:
    """How far a run is, apart from tensors. batch: batches of this epoch that are done."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    items: int = 0
    seconds: float = 0.0
    best: float = -math.inf
    best_epoch: int = 0
    is_done: bool = False
    history: list[dict[str, Any]] = field(default_factory=list)


class Loop:
    """One run while it goes on: model, optimiser, progress, and the best tensors so far."""

    def __init__(
        self,
        run: Prepared,
        folder: Path,
        on_event: OnEvent,
        accelerator: Any,
        encoder: Encoder | None = None,
    ) -> None:
        self.run, self.folder = run, folder
        self.on_event = on_event if accelerator.is_main_process else ignore
        self.accelerator = accelerator
        self.fit: FitSpec = run.recipe.fit
        self.state_path = folder / "state" / "state.pt"
        self.progress = Progress()
        self.trained = run.trained()
        self.best_tensors: dict[str, torch.Tensor] = {}
        self.wrapped, self.optimizer = accelerator.prepare(
            run.model, make_optimizer(self.trained, run.recipe, run.backbone.model)
        )
        self.average = Average(self.trained, self.fit.ema) if self.fit.ema else None
        precision = self.fit.precision
        self.engine: Engine = make_engine(
            self.wrapped, precision=precision, remember=True, encoder=encoder
        )
        # A process without a row to score has no batch; DDP's forward would wait for it for ever.
        is_alone = self.wrapped is run.model
        self.scoring = self.engine if is_alone else make_engine(run.model, precision=precision)
        weights = None if run.weights is None else run.weights.to(accelerator.device)
        self.objective = Objective(run.kind, self.fit, weights)
        self.lengths = [len(example.input_ids) for example in run.examples]
        assert self.fit.epochs is not None, "the recipe is resolved"
        self.epochs = self.fit.epochs
        self.last_saved = time.monotonic()
        # where it computes without a random number, so that others may draw some
        self.away: Callable[[], AbstractContextManager[None]] = nullcontext
        self.share: Callable[[], float] = lambda: 1.0  # of the machine's time that is this run's
        self._batches: list[list[int]] = []
        self.total_steps = count_steps(len(self.lengths), self.fit.batch, self.epochs)
        torch.manual_seed(self.fit.seed + accelerator.process_index)

    def go(self, is_asked_to_stop: Callable[[], bool]) -> None:
        """All epochs that are left.

        Raises:
            Stopped: somebody asked; the state is saved.
            PastinaError: the loss is not finite any more.
        """
        progress = self.progress
        while not progress.is_done:
            while (indices := self.next_indices()) is not None:
                self.step(indices)
                must_stop, must_save = self._agree(is_asked_to_stop(), self.is_due())
                if must_stop:
                    self.stop()
                if must_save:
                    self.save()
            self.end_epoch()

    def remember(self, source: Source) -> None:
        """Work out once what lies below the lowest trained layer, where the engine can keep it."""
        engine, run = self.engine, self.run
        if not isinstance(engine, RememberingEngine) or self.progress.is_done:
            return
        train_mode(run.model)
        started = time.perf_counter()

        def work() -> Memory:
            examples = [*run.examples, *run.scorer.examples]
            self.on_event(Note(f"Working out the frozen layers for {len(examples)} texts, once."))
            file = self.folder / "state" / "lower-layers.bin"
            return engine.remember(examples, run.pad_id, self.accelerator.device, file)

        engine.memory = source.once(f"{engine.what} {run.rows_key}", work)
        self.progress.seconds += time.perf_counter() - started

    def next_indices(self) -> list[int] | None:
        """The training rows of the next step; None: the epoch has no more."""
        if not self._batches:
            fit, epoch = self.fit, self.progress.epoch
            self._batches = training_batches(self.lengths, fit.batch, seed=fit.seed, epoch=epoch)
            train_mode(self.run.model)
        done = self.progress.batch
        return self._batches[done] if done < len(self._batches) else None

    def is_due(self) -> bool:
        """Whether the state was saved long enough ago."""
        return time.monotonic() - self.last_saved >= self.fit.save_seconds

    def _agree(self, *flags: bool) -> tuple[bool, ...]:
        """Which flags are set in any process: what they do next they must do together."""
        if self.accelerator.num_processes == 1:
            return flags
        counts = torch.tensor(flags, dtype=torch.float, device=self.accelerator.device)
        return tuple((self.accelerator.reduce(counts, "sum") > 0).tolist())

    def step(self, indices: list[int]) -> None:
        """Learn from these rows."""
        started = time.perf_counter()
        batch = self.batch(indices)
        loss = self.loss(self.engine.logits(batch), batch, indices)
        value = self.checked(loss)
        self.accelerator.backward(loss)
        self.learn()
        self.count_step(indices, value, time.perf_counter() - started)

    def checked(self, loss: torch.Tensor) -> float:
        """The loss of all processes.

        Raises:
            PastinaError: it is not finite.
        """
        value = float(self.accelerator.reduce(loss.detach(), "mean"))
        self._check_finite("loss", value, self.progress.step + 1)
        return value

    def learn(self) -> None:
        """One step of the optimiser along the gradients that are there."""
        self._set_rates()
        if self.fit.clip:
            self.accelerator.clip_grad_norm_(self.trained.values(), self.fit.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update(self.progress.step)

    def _check_finite(self, what: str, value: float, step: int) -> None:
        if not math.isfinite(value):
            raise PastinaError(
                f"The {what} became {value} in epoch {self.progress.epoch + 1}, step {step}. Lower "
                f"fit.lr ({self.fit.lr}) or fit.head_lr ({self.fit.head_lr}). No adapter was written."
            )

    def _set_rates(self) -> None:
        share = lr_share(self.progress.step, self.total_steps, self.fit.warmup, self.fit.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * share

    def batch(self, indices: list[int]) -> Batch:
        """These rows, or this process's share of them (at least one, to go through DDP's forward).

        All of them again behind them, where the objective compares two answers.
        """
        examples = [self.run.examples[i] for i in self._share(indices)] * self.objective.copies
        return collate(examples, self.run.pad_id).to(self.accelerator.device)

    def loss(self, logits_NC: torch.Tensor, batch: Batch, indices: list[int]) -> torch.Tensor:
        """The mean loss over the items of all rows, as far as they are in this process's batch."""
        taught_NC = None
        if (teacher := self.run.teacher) is not None:
            taught_NC = torch.cat([teacher.logits[i] for i in self._share(indices)])
            taught_NC = taught_NC.to(logits_NC.device)
        losses_N = self.objective.losses(logits_NC, _targets(batch), taught_NC)
        num_items = sum(count_items(self.run.examples[i]) for i in indices)
        # DDP averages gradients over processes, hence the factor; a process without rows adds 0
        share = self.accelerator.num_processes if self._mine(indices) else 0
        return losses_N.sum() * share / max(num_items, 1)

    def _share(self, indices: list[int]) -> list[int]:
        return self._mine(indices) or indices[:1]

    def _mine(self, indices: list[int]) -> list[int]:
        return indices[self.accelerator.process_index :: self.accelerator.num_processes]

    def count_step(self, indices: list[int], loss: float, seconds: float) -> None:
        """A step on these rows is done."""
        progress = self.progress
        num_items = sum(count_items(self.run.examples[i]) for i in indices)
        progress.step += 1
        progress.batch += 1
        progress.loss_sum += loss * num_items
        progress.items += num_items
        progress.seconds += seconds
        self.on_event(
            Step(
                step=progress.step,
                total_steps=self.total_steps,
                epoch=progress.epoch + 1,
                epochs=self.epochs,
                loss=loss,
                examples_per_second=len(indices) / seconds,
            )
        )

    def end_epoch(self) -> None:
        """Score the dev part, where its turn has come; remember the best, save."""
        progress, epoch = self.progress, self.progress.epoch + 1
        is_last = epoch == self.epochs
        is_scored = is_last or epoch % self.fit.score_every == 0
        metrics = self._score(epoch) if is_scored else {}
        loss = progress.loss_sum / max(progress.items, 1)
        progress.batch, progress.loss_sum, progress.items = 0, 0.0, 0
        self._batches = []
        progress.epoch = epoch
        progress.is_done = is_last or (is_scored and self._is_tired())
        self._record(loss, metrics)
        is_best = progress.best_epoch == epoch
        self.on_event(EpochEnd(epoch, self.epochs, loss, metrics, is_best))
        self.save()

    def _score(self, epoch: int) -> dict[str, float]:
        """The metrics on dev after this epoch; the tensors are kept if they are the best so far."""
        started = time.perf_counter()
        progress, metric = self.progress, self.run.metric
        self.run.model.eval()
        with nullcontext() if self.average is None else self.average.in_place():
            try:
                metrics = self.run.scorer.score(
                    self.scoring, self.accelerator.device, self.accelerator, self.away
                )
            except NotFinite:
                metrics = {metric: math.nan}
        self._check_finite(f"{metric} on dev", metrics[metric], progress.step)
        worth = metrics[metric] * (-1 if metric in LOWER_IS_BETTER else 1)
        if worth > progress.best or not self.best_tensors:
            progress.best, progress.best_epoch = worth, epoch
            kept = self.trained if self.average is None else self.average.tensors
            self.best_tensors = {n: t.detach().cpu().clone() for n, t in kept.items()}
        progress.seconds += (time.perf_counter() - started) * self.share()
        return metrics

    def _is_tired(self) -> bool:
        patience, progress = self.fit.patience, self.progress
        return patience is not None and progress.epoch - progress.best_epoch >= patience

    def _record(self, loss: float, metrics: dict[str, float]) -> None:
        progress = self.progress
        progress.history.append(
            {
                "epoch": progress.epoch,
                "step": progress.step,
                "loss": loss,
                "dev": metrics,
                "seconds": round(progress.seconds, 3),
            }
        )
        tracked = {f"dev/{name}": value for name, value in metrics.items()}
        self.accelerator.log({"loss": loss, **tracked}, step=progress.step)
        self._write_history()

    def _write_history(self) -> None:
        if self.accelerator.is_main_process:
            with whole_file(self.folder / "metrics.jsonl") as file:
                file.writelines(json.dumps(record) + "\n" for record in self.progress.history)

    def stop(self) -> None:
        """Save and raise Stopped."""
        self.save()
        raise Stopped(
            f"Stopped in epoch {self.progress.epoch + 1} after step {self.progress.step} of "
            f"{self.total_steps}. Go on with: pastina train --resume --out {self.folder}"
        )

    def save(self) -> None:
        """Write where the run stands."""
        self.last_saved = time.monotonic()
        random_states = gather(random_state(), self.accelerator)
        if self.accelerator.is_main_process:
            save_state(
                self.state_path,
                {
                    "data": self.run.data.digest,
                    "backbone": self.run.backbone.files.digest,
                    "precision": self.engine.precision,
                    "progress": asdict(self.progress),
                    "trained": {name: p.detach().cpu() for name, p in self.trained.items()},
                    "best": self.best_tensors,
                    "optimizer": self.optimizer.state_dict(),
                    "random": random_states,
                    "teacher": self.teacher_digest,
                    "average": {n: t.cpu() for n, t in self.average.tensors.items()}
                    if self.average is not None
                    else None,
                },
            )

    def restore(self) -> None:
        """Go back to the last saved state, or stay at the start where none was saved yet.

        Raises:
            RecipeError: the data, the backbone, the precision or the number of processes changed since.
            PastinaError: the state cannot be read.
        """
        if not self.state_path.is_file():
            return
        state = load_state(self.state_path)
        for what, seen in (
            ("data", self.run.data.digest),
            ("backbone", self.run.backbone.files.digest),
            ("teacher", self.teacher_digest),
        ):
            if state.get(what) != seen:
                raise RecipeError(
                    f"The {what} changed since the run in {self.folder} was begun. Train from the "
                    "start in another folder."
                )
        if state["precision"] != self.engine.precision:
            raise RecipeError(
                f"The run in {self.folder} was begun in {state['precision']}, this machine would go on "
                f"in {self.engine.precision}. Go on where it was begun, or train from the start in "
                f"another folder with fit.precision={state['precision']}."
            )
        if len(state["random"]) != self.accelerator.num_processes:
            raise RecipeError(
                f"The run in {self.folder} was begun with {len(state['random'])} processes, this is "
                f"{self.accelerator.num_processes}. Go on with as many as before."
            )
        self.progress = Progress(**state["progress"])
        self._set_tensors(state["trained"])
        self.best_tensors = state["best"]
        if self.average is not None:
            self.average.restore(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        restore_random_state(state["random"][self.accelerator.process_index])
        self._write_history()

    @property
    def teacher_digest(self) -> str | None:
        """Whom the run learns from."""
        return None if self.run.teacher is None else self.run.teacher.digest

    def take_best(self) -> dict[str, Any]:
        """Put the best epoch's tensors into the model; returns that epoch's record."""
        self._set_tensors(self.best_tensors)
        self.run.model.eval()
        return self.progress.history[self.progress.best_epoch - 1]

    def _set_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(tensors[name])


def count_steps(num_rows: int, batch: int, epochs: int) -> int:
    """Steps of the optimiser; the last batch of an epoch may be smaller.

    >>> count_steps(3668, 32, 150), count_steps(14041, 16, 100)
    (17250, 87800)
    """
    return math.ceil(num_rows / batch) * epochs


def _targets(batch: Batch) -> torch.Tensor:
    assert batch.targets is not None, "training rows have labels"
    return batch.targets

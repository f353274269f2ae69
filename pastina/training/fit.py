"""One run: a recipe in, an adapter out. Can be killed at any moment and resumed to the same bits."""

import importlib.metadata
import json
import os
import platform
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from pastina.adapter import BackboneId, Card, save_adapter, size_on_disk
from pastina.engine.encoder import Encoder
from pastina.engine.native import processor
from pastina.errors import RecipeError
from pastina.files import no_empty_folders, remove_leftovers, whole_file
from pastina.recipe import Recipe, read_recipe, recipe_toml
from pastina.training.accelerated import accelerated
from pastina.training.events import OnEvent, ignore
from pastina.training.loop import Loop
from pastina.training.prepare import Prepared, Source, prepare

LOCK = ".lock"


@dataclass(frozen=True, slots=True)
class Run:
    """What a recipe produced. adapter: the folder to load; metrics: of the best epoch on dev."""

    folder: Path
    adapter: Path
    best_epoch: int
    metric: str
    metrics: dict[str, float]
    trained_parameters: int
    adapter_bytes: int
    seconds: float


def train(
    recipe: Recipe, out: str | Path, *, resume: bool = False, on_event: OnEvent = ignore
) -> Run:
    """Train one adapter; `out` then holds adapter/, metrics.jsonl, recipe.toml and result.json.

    resume: go on with the run that was begun in `out` with the same recipe; it ends with the same
    weights as if it had not been interrupted. on_event: hears of steps and epochs.

    Raises:
        RecipeError: settings that do not fit the data; `out` is taken; nothing to resume.
        DataError: bad data. BackboneError: no such backbone. Stopped: Ctrl-C; resume later.
    """
    folder, recipe = Path(out), recipe.resolved()
    check_folder(folder, recipe, resume)
    prepared = prepare(recipe, on_event)
    with accelerated(recipe, folder) as accelerator, alone_in(folder, accelerator):
        loop = begin(prepared, folder, on_event, accelerator, resume=resume)
        with stop_on_signal() as is_asked_to_stop:
            loop.go(is_asked_to_stop)
        return finish(loop)


def begin(
    prepared: Prepared,
    folder: Path,
    on_event: OnEvent,
    accelerator: Any,
    *,
    resume: bool,
    encoder: Encoder | None = None,
    source: Source | None = None,
) -> Loop:
    """The loop of a run at its start, or where it was saved last; the folder is this process's own.

    Raises:
        RecipeError: somebody trained into the folder meanwhile; what is saved does not fit.
    """
    if accelerator.is_main_process and not resume and (folder / "adapter").exists():
        raise RecipeError(f"Another process trained into {folder} just now. Name another folder.")
    loop = Loop(prepared, folder, on_event, accelerator, encoder)
    accelerator.wait_for_everyone()  # nobody shall find the folder taken by this run itself
    if resume:
        loop.restore()
    elif accelerator.is_main_process:
        with whole_file(folder / "recipe.toml") as file:
            file.write(recipe_toml(prepared.recipe))
    loop.remember(source or Source())
    return loop


def resume_recipe(out: str | Path) -> Recipe:
    """The recipe of a run that was begun in this folder.

    Raises:
        RecipeError: no run was begun there.
    """
    path = Path(out) / "recipe.toml"
    if not path.is_file():
        raise RecipeError(f"There is nothing to resume in {out}: it holds no recipe.toml.")
    return read_recipe(path)


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    import peft
    import transformers

    return {
        "pastina": importlib.metadata.version("pastina"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }


def machine() -> dict[str, Any]:
    """What a timing depends on."""
    return {
        "system": platform.system(),
        "processor": platform.machine(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _cpu() -> str:
    """The processor's name; on Linux its generation too, as one name may stand for several."""
    cpu = processor().get("cpu_name") or platform.processor() or "unknown processor"
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return cpu
    told = {key.strip(): value.strip() for key, _, value in (x.partition(":") for x in lines)}
    names = {"cpu family": "family", "model": "model"}
    parts = [f"{name} {told[key]}" for key, name in names.items() if key in told]
    return f"{cpu} ({', '.join(parts)})" if parts else cpu


def read_run(folder: Path) -> Run | None:
    """The run in this folder, if it came to its end."""
    if not (folder / "result.json").is_file() or not (folder / "adapter").is_dir():
        return None
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return Run(
        folder=folder,
        adapter=folder / "adapter",
        best_epoch=result["best_epoch"],
        metric=result["metric"],
        metrics=result["dev"],
        trained_parameters=result["trained_parameters"],
        adapter_bytes=result["adapter_bytes"],
        seconds=result["seconds"],
    )


def check_folder(folder: Path, recipe: Recipe, resume: bool) -> None:
    """Nothing, if this run may begin, or go on, in the folder.

    Raises:
        RecipeError: it may not.
    """
    if resume:
        if resume_recipe(folder) != recipe:
            raise RecipeError(
                f"The run in {folder} was begun with another recipe. Resume it with its own "
                f"({folder / 'recipe.toml'}), or train into another folder."
            )
    elif folder.exists() and (not folder.is_dir() or _holds_a_run(folder)):
        raise RecipeError(
            f"{folder} exists and is not empty. Name another folder, or resume the run in it."
        )


def _holds_a_run(folder: Path) -> bool:
    """Whether anything is lost by training into it; a run that failed at once leaves its recipe."""
    return any(
        path.name not in ("recipe.toml", LOCK) and not path.name.startswith(".recipe.toml.")
        for path in folder.iterdir()
    )


@contextmanager
def alone_in(folder: Path, accelerator: Any) -> Iterator[None]:
    """Nobody else trains into the folder meanwhile; the lock goes with the process, however it ends.

    A folder that was made for a run which did not begin goes as well.

    Raises:
        RecipeError: somebody does.
    """
    if not accelerator.is_main_process:
        yield
        return
    with no_empty_folders(folder):
        lock = FileLock(folder / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise RecipeError(
                f"Another process trains into {folder} at this moment. Name another folder, or wait."
            ) from None
        remove_leftovers(folder, ("recipe.toml", "metrics.jsonl", "result.json", "adapter"))
        remove_leftovers(folder / "state", ("state.pt",))
        try:
            yield
        finally:
            (folder / LOCK).unlink(missing_ok=True)
            lock.release()


def finish(loop: Loop) -> Run:
    """Write the adapter of the best epoch and the result."""
    prepared = loop.run
    best, adapter = loop.take_best(), loop.folder / "adapter"
    card = _card(prepared, loop, best["dev"])
    if loop.accelerator.is_main_process:
        card = save_adapter(prepared.model, card, adapter)
        with whole_file(loop.folder / "result.json") as file:
            json.dump(_result(prepared, loop, card), file, indent=1)
    loop.accelerator.wait_for_everyone()
    return Run(
        folder=loop.folder,
        adapter=adapter,
        best_epoch=best["epoch"],
        metric=prepared.metric,
        metrics=best["dev"],
        trained_parameters=card.trained_parameters,
        adapter_bytes=size_on_disk(adapter),
        seconds=loop.progress.seconds,
    )


def _card(prepared: Prepared, loop: Loop, metrics: dict[str, float]) -> Card:
    files, recipe = prepared.backbone.files, prepared.recipe
    return Card(
        name=recipe.name or loop.folder.name,
        kind=recipe.kind,
        labels=tuple(prepared.data.labels),
        method=recipe.method.name,
        is_pair=prepared.is_pair,
        pooling=prepared.pooling,
        max_length=recipe.data.max_length,
        stride=recipe.data.stride,
        target_mean=prepared.target_scale[0],
        target_std=prepared.target_scale[1],
        backbone=BackboneId(
            name=files.name,
            revision=files.revision,
            digest=files.digest,
            tokenizer_digest=files.tokenizer_digest,
            config_digest=files.config_digest,
            num_layers=prepared.backbone.num_layers,
        ),
        trained_parameters=sum(parameter.numel() for parameter in loop.trained.values()),
        metrics={"dev": metrics},
        recipe=recipe.model_dump(mode="json"),
        versions=versions(),
    )


def _result(prepared: Prepared, loop: Loop, card: Card) -> dict[str, Any]:
    """All that is needed to make this result again, and what came out."""
    progress, data = loop.progress, prepared.data
    return {
        "metric": prepared.metric,
        "dev": card.metrics["dev"],
        "best_epoch": progress.best_epoch,
        "epochs": progress.epoch,
        "steps": progress.step,
        "seconds": round(progress.seconds, 2),
        "engine": loop.engine.name,
        "trained_parameters": card.trained_parameters,
        "adapter_bytes": size_on_disk(loop.folder / "adapter"),
        "adapter_digest": card.digest,
        "data_digest": data.digest,
        "rows": {"train": len(data.train), "dev": len(data.dev), "test": len(data.test)},
        "backbone": card.backbone.model_dump(),
        "seed": prepared.recipe.fit.seed,
        "recipe": card.recipe,
        "versions": card.versions,
        "machine": machine(),
    }


@contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
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

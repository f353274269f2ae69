"""What a run has of accelerate: its device, the processes it is spread over, its trackers."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pastina.errors import RecipeError
from pastina.recipe import Recipe


@contextmanager
def accelerated(recipe: Recipe, folder: Path) -> Iterator[Any]:
    """accelerate's side of a run: device, processes, trackers.

    Raises:
        RecipeError: a tracker of fit.report_to is not known or not installed.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    fit = recipe.fit
    _check_trackers(fit.report_to)
    try:
        accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),  # else it does not see other CPU processes
            log_with=list(fit.report_to) or None,
            project_dir=str(folder),
        )
        if fit.report_to:
            accelerator.init_trackers(recipe.name or folder.name)
        yield accelerator
        accelerator.end_training()
    finally:
        # accelerate keeps its settings for the life of the process; the next run has its own
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()


def gather(value: Any, accelerator: Any) -> list[Any]:
    """One value of each process, in order."""
    if accelerator.num_processes == 1:
        return [value]
    from accelerate.utils import gather_object

    return gather_object([value])


def _check_trackers(wanted: tuple[str, ...]) -> None:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    have = {"all", *(str(tracker) for tracker in get_available_trackers())}
    known = sorted(str(tracker) for tracker in LOGGER_TYPE_TO_CLASS)
    for name in wanted:
        if name not in known and name != "all":
            raise RecipeError(
                f"fit.report_to names {name!r}, which accelerate does not know. It knows "
                f"{', '.join(known)}."
            )
        if name not in have:
            raise RecipeError(
                f"fit.report_to names {name!r}, which is not installed. Install it, or remove it."
            )

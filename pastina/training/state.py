"""Where a run stands, on disk: enough to go on after kill -9 and end with the same weights."""

import random
from pathlib import Path
from typing import Any

import torch

from pastina.errors import PastinaError
from pastina.files import whole_file


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain values, atomically."""
    with whole_file(path, "wb") as file:
        torch.save(state, file)


PARTS = {"data", "backbone", "precision", "progress", "trained", "best", "optimizer", "random"}


def load_state(path: Path) -> dict[str, Any]:
    """What `save_state` wrote, with all PARTS; nothing in it is executed.

    Raises:
        PastinaError: the file is not such a state.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if missing := PARTS - set(state):
            raise ValueError(f"it lacks {min(missing)}")
        return state
    except Exception as error:
        raise PastinaError(
            f"{path} cannot be read as the state of a run ({type(error).__name__}). "
            "Delete the folder and train again."
        ) from error


def random_state() -> dict[str, Any]:
    """The state of the random generators that training draws from."""
    version, numbers, gauss = random.getstate()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": (version, list(numbers), gauss),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Put the generators back where `random_state` found them."""
    torch.set_rng_state(state["torch"])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])

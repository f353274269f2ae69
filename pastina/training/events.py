"""What a training run reports while it runs; the library prints nothing itself."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Step:
    """After each optimiser step. loss is the mean of this batch."""

    step: int
    total_steps: int
    epoch: int
    epochs: int
    loss: float
    examples_per_second: float


@dataclass(frozen=True, slots=True)
class EpochEnd:
    """After each epoch: the metrics on dev, none where it was not scored; is_best: the best so far."""

    epoch: int
    epochs: int
    loss: float
    metrics: dict[str, float]
    is_best: bool


@dataclass(frozen=True, slots=True)
class Note:
    """Something worth telling a person."""

    text: str


@dataclass(frozen=True, slots=True)
class OfMember:
    """Something that happened to one member of a fleet; name: its folder."""

    name: str
    event: Step | EpochEnd | Note


Event = Step | EpochEnd | Note | OfMember
OnEvent = Callable[[Event], None]


def ignore(event: Event) -> None:
    """The listener of those who do not listen."""

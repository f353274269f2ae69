"""A training run, shown in a terminal: a bar with the time that is left, a line for each epoch."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pastina.training.events import EpochEnd, Event, Note, OfMember, OnEvent, Step


@contextmanager
def show_progress(console: Console) -> Iterator[OnEvent]:
    """A listener for `train` that draws on this console until the block ends."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("loading", total=None, speed="")
        fleet: dict[str, Step] = {}

        def on_event(event: Event) -> None:
            match event:
                case OfMember(name, Step() as step):
                    fleet[name] = step
                    steps = fleet.values()
                    bar.update(
                        task,
                        description=f"{len(fleet)} in the fleet",
                        completed=sum(step.step for step in steps),
                        total=sum(step.total_steps for step in steps),
                        speed=f"{step.examples_per_second:.0f} examples/s",
                    )
                case OfMember(name, inner):
                    bar.console.print(f"{name}: ", end="", highlight=False, soft_wrap=True)
                    on_event(inner)
                case Step():
                    bar.update(
                        task,
                        description=f"epoch {event.epoch}/{event.epochs}",
                        completed=event.step,
                        total=event.total_steps,
                        speed=f"{event.examples_per_second:.0f} examples/s",
                    )
                case EpochEnd():
                    metrics = "  ".join(f"{n} {v:.4f}" for n, v in event.metrics.items())
                    best = "  (best so far)" if event.is_best else ""
                    bar.console.print(
                        f"epoch {event.epoch}/{event.epochs}  loss {event.loss:.4f}  {metrics}{best}",
                        highlight=False,
                        soft_wrap=True,
                    )
                case Note():
                    bar.console.print(event.text, highlight=False, soft_wrap=True)

        yield on_event

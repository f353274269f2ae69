"""Measurements, shown in a terminal: a bar for the group at hand, a line for each that is done."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pastina.bench.speed import Begin, End, Event, OnEvent, Tick


@contextmanager
def show_measuring(console: Console) -> Iterator[OnEvent]:
    """A listener for `measure_speed` that draws on this console until the block ends."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)

        def on_event(event: Event) -> None:
            match event:
                case Begin(is_kept=True):
                    bar.console.print(f"{event.group}: kept, the file holds it", highlight=False)
                case Begin():
                    bar.reset(task, description=event.group, total=None)
                case Tick():
                    bar.update(task, completed=event.done, total=event.total)
                case End():
                    parts = [event.group, f"{event.seconds:.0f} s"]
                    known = {n: v for n, v in event.figures.items() if v is not None}
                    parts += [f"{name} {value:g}" for name, value in known.items()]
                    bar.console.print("  ".join(parts), highlight=False, soft_wrap=True)

        yield on_event

"""Measurements, shown in a terminal: a bar for the group at hand, a line for each that is done."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pastina.bench import run
from pastina.bench.results import Record
from pastina.bench.speed import Begin, End, Event, OnEvent, Tick
from pastina.training import events as training


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


@contextmanager
def show_grid(console: Console) -> Iterator[run.OnEvent]:
    """A listener for `run_grid`: a bar for the run at hand, a line for each that is done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as bar:
        task = bar.add_task("", total=None)

        def on_event(event: run.Event) -> None:
            match event:
                case run.JobBegin(job, left):
                    bar.reset(task, description=f"{job.name} ({left} left)", total=None)
                case training.Step():
                    bar.update(task, completed=event.step, total=event.total_steps)
                case run.JobEnd(job, record):
                    bar.console.print(_line(job.name, record), highlight=False, soft_wrap=True)
                case run.Waiting(left):
                    text = f"{left} runs are other processes' work; waiting for them"
                    bar.console.print(text, highlight=False, soft_wrap=True)

        yield on_event


def _line(name: str, record: Record) -> str:
    if "error" in record:
        return f"{name}  failed: {record['error']}"
    metric = record["metric"]
    parts = [name, f"dev {metric} {record['dev'][metric]:.4f}"]
    parts += [f"test {record['test'][metric]:.4f}"] if record.get("test") else []
    return "  ".join([*parts, f"{record['seconds']:.0f} s", f"{record['memory_mb']} MB"])

"""`pastina bench`: each verb parses, calls one function and prints."""

import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from pastina.console import Json, print_json, print_table, stderr
from pastina.errors import PastinaError

bench = typer.Typer(
    help="Measure pastina on this machine.", no_args_is_help=True, rich_markup_mode=None
)
Quick = Annotated[
    bool, typer.Option("--quick", help="Little of everything: whether it works, not how fast.")
]
JsonFile = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Write there after each group, and go on there."),
]
Groups = Annotated[
    list[str] | None,
    typer.Option(metavar="GROUP", help="Measure this group; may be given again."),
]
Backbone = Annotated[
    str | None, typer.Option(help="Folder or hub id; default: the default backbone.")
]


@bench.command()
def speed(
    quick: Quick = False,
    json_file: JsonFile = None,
    picture: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw the curves, as FILE.png and FILE.svg."),
    ] = None,
    only: Groups = None,
    data: Annotated[Path, typer.Option(metavar="FOLDER", help="Holds clinc150/ and qnli/.")] = Path(
        "../shared/data"
    ),
    backbone: Backbone = None,
) -> None:
    """Measure speed side by side with transformers and PEFT: training, prediction, many tasks.

    The figures are ratios unless their name ends in a unit. It takes about an hour; stop it at any
    time, the same command goes on with the groups that are missing in --json.
    """
    with stderr.status("Loading ..."):
        from pastina.bench.speed import figures, measure_speed

    options = {"data": data, "json_file": json_file, "picture": picture}
    _measure(measure_speed, figures, quick, only, backbone, options)


@bench.command()
def serve(
    quick: Quick = False,
    json_file: JsonFile = None,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the comparison, as FILE.svg.")
    ] = None,
    only: Groups = None,
    data: Annotated[Path, typer.Option(metavar="FOLDER", help="Holds clinc150/.")] = Path(
        "../shared/data"
    ),
    backbone: Backbone = None,
) -> None:
    """Measure `pastina serve` under load from another process, beside what people use today.

    It takes more than an hour, ten minutes of it at full load; stop it at any time, the same command
    goes on with the groups that are missing in --json.
    """
    with stderr.status("Loading ..."):
        from pastina.bench.serving import figures, measure_serving

    options = {"data": data, "json_file": json_file, "picture": picture}
    _measure(measure_serving, figures, quick, only, backbone, options)


def _measure(
    measure: Callable[..., Any],
    figures: Callable[[Any], dict[str, float | None]],
    quick: bool,
    only: list[str] | None,
    backbone: str | None,
    options: dict[str, Any],
) -> None:
    from pastina.bench.show import show_measuring
    from pastina.recipe import DEFAULT_BACKBONE

    with _ended_in_order(), show_measuring(stderr) as on_event:
        result = measure(
            is_quick=quick,
            only=only or (),
            backbone=backbone or DEFAULT_BACKBONE,
            command=_command(sys.argv[1:]),
            on_event=on_event,
            **options,
        )
    rows = [
        [key, result.get("notes", {}).get(key, "") if value is None else f"{value:g}"]
        for key, value in figures(result).items()
    ]
    print_table(["figure", "value"], rows)


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """SIGTERM ends the block as an error would, so that the processes it started end as well."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _command(arguments: list[str]) -> str:
    """What was typed, as anybody could: of places on this machine the last part."""

    def anywhere(argument: str) -> str:
        name, equals, value = argument.rpartition("=")
        return name + equals + (Path(value).name if Path(value).is_absolute() else value)

    return shlex.join(["pastina", *map(anywhere, arguments)])


@bench.command("run")
def run_bench(
    grid_file: Annotated[Path, typer.Argument(metavar="GRID.toml", help="What is to be run.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the results; default results/NAME.")
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A method, a data set or data/method; again for more."),
    ] = None,
    shard: Annotated[
        str,
        typer.Option(metavar="I/N", help="Every N-th cell, from the I-th: for several machines."),
    ] = "1/1",
    list_: Annotated[
        bool, typer.Option("--list", help="Show how the runs stand, run none.")
    ] = False,
    retry: Annotated[bool, typer.Option(help="Run again what failed.")] = False,
    keep: Annotated[bool, typer.Option(help="Keep the adapters, in OUT/.work.")] = False,
    as_json: Json = False,
) -> None:
    """Run a grid: methods x data sets x seeds x rates, a result file for each run.

    What is done is not run again. Stop it at any time, or start it in several processes: the same
    command goes on. Rates are chosen on dev with the first seed; test is looked at for the chosen only.
    """
    from pastina.bench.grid import read_grid

    grid = read_grid(grid_file)
    out = out or Path("results") / grid.spec.name
    part = _shard(shard)
    with stderr.status("Loading ..."):
        from pastina.bench.run import listing, run_grid
        from pastina.bench.show import show_grid

    if list_:
        rows = listing(grid, out, only=only or (), shard=part)
        if as_json:
            print_json(rows)
        else:
            print_table(["run", "id", "state"], [list(row.values())[:3] for row in rows])
        return
    with show_grid(stderr) as on_event:
        end = run_grid(
            grid, out, only=only or (), shard=part, retry=retry, keep=keep, on_event=on_event
        )
    if as_json:
        print_json({"done": end.done, "failed": [record["error"] for record in end.failed]})
    else:
        typer.echo(f"{end.done} runs done, {len(end.failed)} failed: {out}")
    if end.failed:
        raise PastinaError(f"{len(end.failed)} runs failed; the first: {end.failed[0]['error']}")


@bench.command("table")
def table_bench(
    results: Annotated[Path, typer.Argument(metavar="RESULTS", help="Folder of `bench run`.")],
    format: Annotated[str, typer.Option(help="md, csv, latex or html.")] = "md",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write there.")] = None,
) -> None:
    """Print the table of a grid, from its result files alone: the same files, the same bytes."""
    from pastina.bench.table import bench_table
    from pastina.files import whole_file

    text = bench_table(results, format)
    if out is None:
        typer.echo(text, nl=False)
        return
    with whole_file(out) as file:
        file.write(text)


@bench.command("plot")
def plot_bench(
    results: Annotated[Path, typer.Argument(metavar="RESULTS", help="Folder of `bench run`.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Beginning of the files' names; default RESULTS/plot."),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="PICTURE", help="pareto, curves or rows; again for more."),
    ] = None,
) -> None:
    """Draw a grid's results: score against parameters, learning curves, score against training rows."""
    from pastina.bench.plot import bench_plot

    for path in bench_plot(results, out or results / "plot", only or ()):
        typer.echo(str(path))


@bench.command("evidence")
def evidence_bench(
    results: Annotated[
        list[Path], typer.Argument(metavar="RESULTS...", help="Folders of `bench run`.")
    ],
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the figures there.")
    ] = None,
    plain: Annotated[str, typer.Option(help="Plain PASTA, as the grid calls it.")] = "pasta",
    best: Annotated[str, typer.Option(help="The best preset of PASTA.")] = "pasta-best",
    small: Annotated[
        str, typer.Option(help="The best preset with a tenth of LoRA's numbers.")
    ] = "pasta-wide",
    lora: Annotated[str, typer.Option(help="LoRA, rank 8.")] = "lora",
    ordinary: Annotated[
        list[str] | None,
        typer.Option(help="Vectors on ordinary positions; again for another control."),
    ] = None,
) -> None:
    """Compute the figures of results/evidence.json from result files."""
    from pastina.bench.evidence import Labels, bench_evidence

    labels = Labels(plain=plain, special=plain, best=best, small=small, lora=lora)
    if ordinary:
        labels = replace(labels, ordinary=tuple(ordinary))
    figures = bench_evidence(results, labels, json_file)
    how = figures.pop("how")
    rows = [
        [key, "" if value is None else f"{value:g}", how.get(key, "")]
        for key, value in figures.items()
    ]
    print_table(["figure", "value", "how"], rows)


def _shard(text: str) -> tuple[int, int]:
    part, slash, parts = text.partition("/")
    if not (slash and part.isdigit() and parts.isdigit()):
        raise typer.BadParameter(f"--shard takes I/N such as 2/4, not {text!r}")
    return int(part), int(parts)

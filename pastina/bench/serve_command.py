"""`pastina bench serve`."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer


def serve(
    quick: Annotated[
        bool, typer.Option("--quick", help="Little of everything: whether it works, not how fast.")
    ] = False,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json", metavar="FILE", help="Write there after each group, and go on there."
        ),
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the comparison, as FILE.svg.")
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="GROUP", help="Measure this group; may be given again."),
    ] = None,
    data: Annotated[Path, typer.Option(metavar="FOLDER", help="Holds clinc150/.")] = Path(
        "../shared/data"
    ),
    backbone: Annotated[
        str | None, typer.Option(help="Folder or hub id; default: the default backbone.")
    ] = None,
) -> None:
    """Measure `pastina serve` under load from another process, beside what people use today.

    It takes about an hour, ten minutes of it at full load; stop it at any time, the same command goes
    on with the groups that are missing in --json.
    """
    from rich.console import Console

    stderr = Console(stderr=True)
    with stderr.status("Loading ..."):
        from pastina.bench.serving import figures, measure_serving
        from pastina.bench.show import show_measuring
        from pastina.recipe import DEFAULT_BACKBONE

    with show_measuring(stderr) as on_event:
        result = measure_serving(
            is_quick=quick,
            json_file=json_file,
            picture=picture,
            only=only or (),
            data=data,
            backbone=backbone or DEFAULT_BACKBONE,
            command=shlex.join(["pastina", *sys.argv[1:]]),
            on_event=on_event,
        )
    for key, value in figures(result).items():
        typer.echo(f"{key}\t{'' if value is None else f'{value:g}'}")

"""What the verbs of the command line print, and where to.

Results go to stdout, everything for people to stderr.
"""

import json
from collections.abc import Iterable
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

stderr = Console(stderr=True)
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def print_json(value: Any) -> None:
    """To stdout, for programs."""
    typer.echo(json.dumps(value, indent=1, ensure_ascii=False))


def print_table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """A table for a terminal; for a pipe one line a row, cells by tabs, nothing cut to a width."""
    console = Console()
    if not console.is_terminal:
        for row in (columns, *rows):
            typer.echo("\t".join(row))
        return
    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    console.print(table)

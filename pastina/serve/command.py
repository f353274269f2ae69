"""`pastina serve`."""

from pathlib import Path
from typing import Annotated

import typer


def serve(
    folder: Annotated[str, typer.Argument(help="Folder of adapters, or an address of fsspec.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: a free one.")] = 8000,
    tokens: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Who may call what; see docs/serving.md.")
    ] = None,
    uploads: Annotated[
        bool, typer.Option("--uploads", help="Let admin tokens change tasks.")
    ] = False,
    default_task: Annotated[
        str | None, typer.Option(metavar="NAME", help="The task that /predict asks.")
    ] = None,
    backbone: Annotated[
        str | None, typer.Option(help="Folder or hub id; default: that of the adapters.")
    ] = None,
    precision: Annotated[str, typer.Option(help="auto, fp32, bf16 or int8.")] = "auto",
    threads: Annotated[int, typer.Option(help="Of the engine; 0: torch decides.")] = 0,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Another setting; may be given again."),
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="Print all settings and end.")] = False,
) -> None:
    """Serve a folder of adapters over HTTP.

    Example: pastina serve runs --set max_tokens=2048
    """
    from pastina.serve.settings import make_settings

    settings = make_settings(
        {
            "folder": folder,
            "host": host,
            "port": port,
            "tokens": tokens,
            "uploads": uploads,
            "default_task": default_task,
            "backbone": backbone,
            "precision": precision,
            "threads": threads,
        },
        set_ or [],
    )
    if show:
        typer.echo(settings.model_dump_json(indent=1))
        return
    from pastina.errors import need

    for module in ("fastapi", "uvicorn", "prometheus_client", "httptools"):
        need(module, "serve")
    from pastina.serve.run import serve as run

    run(settings)

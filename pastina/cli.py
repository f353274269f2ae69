"""The command line: each verb parses, calls one library function and prints.

Results go to stdout, everything for people to stderr. Exit codes: 0 done, 1 it could not be done (one
sentence says why), 2 wrong usage.
"""

import io
import os
import sys
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from pastina.bench.command import bench
from pastina.console import Json, print_json, print_table, stderr
from pastina.errors import PastinaError, RecipeError
from pastina.serve.command import serve

app = typer.Typer(
    name="pastina",
    help="One frozen transformer, thousands of tasks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(bench, name="bench")
app.command()(serve)
_INTERRUPTED = 130  # what typer makes of Ctrl-C

PrecisionOption = Annotated[
    str,
    typer.Option("--precision", help="Of products with frozen weights: auto, fp32, bf16, int8."),
]
MaxTokens = Annotated[
    int, typer.Option(min=0, help="Of a fleet: tokens in a shared pass, about; 0: the default.")
]
Backbone = Annotated[
    str | None,
    typer.Option(help="Folder or hub id of the backbone, instead of the name in the adapter."),
]


def main() -> None:
    """The entry point: what can go wrong becomes one sentence and exit code 1."""
    for stream, encoding in ((sys.stdin, "utf-8-sig"), (sys.stdout, "utf-8")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding=encoding, errors="strict")
    try:
        app()
    except PastinaError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except SystemExit as end:
        if end.code == _INTERRUPTED:
            _fail("stopped.")
        raise


def _fail(sentence: str) -> NoReturn:
    typer.echo(f"pastina: {sentence}", err=True)
    sys.exit(1)


@app.command()
def train(
    args: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECIPE.toml]... [KEY=VALUE]...",
            help="A recipe and its overrides; several recipes: a fleet, trained together.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the run, of a fleet that of all runs; default runs/NAME."),
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on with the run in --out.")] = False,
    max_tokens: MaxTokens = 0,
    as_json: Json = False,
) -> None:
    """Train one adapter, or several together.

    Examples: pastina train kind=classify data.train=tickets.csv --out runs/tickets;
    pastina train a.toml b.toml --out runs
    """
    from pastina.progress import show_progress
    from pastina.training.events import ignore

    paths = [arg for arg in args or [] if "=" not in arg]
    if len(paths) > 1:
        _train_fleet(
            paths, [arg for arg in args or [] if "=" in arg], out, resume, max_tokens, as_json
        )
        return
    if max_tokens:
        raise typer.BadParameter("--max-tokens is for several recipes")
    recipe_path, overrides = _recipe_and_overrides(args or [])
    is_first = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun started
    with show_progress(stderr) if is_first else nullcontext(ignore) as on_event:
        from pastina.training.fit import resume_recipe, train

        if resume and recipe_path is None and not overrides:
            if out is None:
                raise RecipeError("Which run? Name its folder: pastina train --resume --out FOLDER")
            recipe = resume_recipe(out)
        else:
            recipe = _read(recipe_path, overrides)
        folder = out or Path("runs") / (recipe.name or "run")
        run = train(recipe, folder, resume=resume, on_event=on_event)
    if is_first:
        _print_run(run, as_json)


def _train_fleet(
    paths: list[str],
    overrides: list[str],
    out: Path | None,
    resume: bool,
    max_tokens: int,
    as_json: bool,
) -> None:
    """Each recipe into a folder of its name, or of its file's name."""
    from pastina.progress import show_progress

    with show_progress(stderr) as on_event:
        from pastina.training.fleet import MAX_TOKENS, train_fleet

        recipes = [_read(path, overrides) for path in paths]
        names = [
            recipe.name or Path(path).stem for recipe, path in zip(recipes, paths, strict=True)
        ]
        found = train_fleet(
            recipes,
            [(out or Path("runs")) / name for name in names],
            resume=resume,
            on_event=on_event,
            max_tokens=max_tokens or MAX_TOKENS,
        )
    failed = [run for run in found if isinstance(run, PastinaError)]
    if as_json:
        print_json(
            [
                {"task": name}
                | ({"error": str(r)} if isinstance(r, PastinaError) else _run_record(r))
                for name, r in zip(names, found, strict=True)
            ]
        )
    else:
        rows = [
            [name, "failed", str(run)]
            if isinstance(run, PastinaError)
            else [name, f"{run.metric} {run.metrics[run.metric]:.4f}", str(run.adapter)]
            for name, run in zip(names, found, strict=True)
        ]
        print_table(["task", "dev", "adapter"], rows)
    if failed:
        raise PastinaError(f"{len(failed)} of {len(found)} failed; the first: {failed[0]}")


@app.command()
def tune(
    args: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RECIPE.toml] [KEY=VALUE]...", help="A recipe and its overrides."),
    ] = None,
    try_: Annotated[
        list[str] | None,
        typer.Option("--try", help="KEY=VALUE,VALUE,...: what to try; may be given several times."),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds of each setting: 13,14,15.")] = "",
    out: Annotated[Path | None, typer.Option(help="Folder; default runs/NAME-tuned.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on with the search in --out.")] = False,
    max_tokens: MaxTokens = 0,
    as_json: Json = False,
) -> None:
    """Search settings on the dev part, all trials in one fleet, and write the winner's recipe.

    Trials may fail as long as one does not: the exit code is 1 where there is no winner.

    Examples: pastina tune r.toml --try fit.lr=1e-2,3e-2 --try fit.epochs=5,10 --seeds 13,14;
    pastina tune r.toml --try method=pasta,lora,linear
    """
    from pastina.progress import show_progress

    recipe_path, overrides = _recipe_and_overrides(args or [])
    with show_progress(stderr) as on_event:
        from pastina.recipe import parse_choices
        from pastina.training.fleet import MAX_TOKENS
        from pastina.training.tune import table, tune

        recipe = _read(recipe_path, overrides)
        stem = Path(recipe_path).stem if recipe_path else "run"
        tuned = tune(
            recipe,
            out or Path("runs") / f"{recipe.name or stem}-tuned",
            grid=dict(parse_choices(one) for one in try_) if try_ else None,
            seeds=_seeds(seeds),
            resume=resume,
            on_event=on_event,
            max_tokens=max_tokens or MAX_TOKENS,
        )
    if as_json:
        record = {"metric": tuned.metric, "dev": tuned.score}
        trials = [asdict(trial) for trial in tuned.trials]
        print_json({**record, "recipe": tuned.recipe.model_dump(mode="json"), "trials": trials})
    else:
        typer.echo(table(tuned), nl=False)
    if tuned.failed:
        first = ", ".join(f"{key}={value}" for key, value in tuned.failed[0].settings.items())
        typer.echo(
            f"pastina: {len(tuned.failed)} of {len(tuned.trials)} trials failed; the first, {first}: "
            f"{tuned.failed[0].error}",
            err=True,
        )


def _seeds(text: str) -> list[int] | None:
    try:
        return [int(part) for part in text.split(",")] if text else None
    except ValueError:
        raise typer.BadParameter(f"--seeds takes whole numbers with commas, not {text!r}") from None


@app.command()
def evaluate(
    adapter: Annotated[Path, typer.Argument(help="Folder of an adapter or of a run.")],
    data: Annotated[Path | None, typer.Argument(help="A file with labelled rows.")] = None,
    part: Annotated[
        str, typer.Option(help="Without a file: the part of the recipe's data, dev or test.")
    ] = "test",
    backbone: Backbone = None,
    precision: PrecisionOption = "auto",
    as_json: Json = False,
) -> None:
    """Print the metrics of an adapter."""
    from pastina.training.evaluate import evaluate

    metrics = evaluate(adapter, data, part=part, backbone=backbone, precision=_precision(precision))
    if as_json:
        print_json(metrics)
    else:
        print_table(["metric", "value"], [[n, f"{v:.4f}"] for n, v in metrics.items()])


@app.command()
def predict(
    adapter: Annotated[Path, typer.Argument(help="Folder of an adapter or of a run.")],
    texts: Annotated[
        list[str] | None,
        typer.Argument(help="Texts; for a task on pairs two after two. None: lines of stdin."),
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="csv, tsv, jsonl, parquet or txt to read.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write there.")] = None,
    format: Annotated[str, typer.Option(help="jsonl or csv; default: by the name of --out.")] = "",
    text: Annotated[str | None, typer.Option(help="Column of the text in --file.")] = None,
    text_pair: Annotated[str | None, typer.Option(help="Column of the second text.")] = None,
    keep_going: Annotated[
        bool, typer.Option(help="A row that cannot be answered gets an error, the others go on.")
    ] = False,
    backbone: Backbone = None,
    precision: PrecisionOption = "auto",
    as_json: Json = False,
) -> None:
    """Answer texts: one JSON line (or CSV row) each, in order, as they are answered."""
    from pastina.records import answer_records, read_texts, write_records

    format = _output_format(format, out, as_json)
    if file is not None and texts:
        raise typer.BadParameter("give texts or --file, not both")
    if file is None and (text or text_pair):
        raise typer.BadParameter("--text and --text-pair name columns of --file; give that too")
    if file is not None and out is not None and out.exists() and out.samefile(file):
        raise typer.BadParameter("--out is the file that is read; name another one")
    with stderr.status("Loading ..."):
        from pastina.predict import load

        predictor = load(adapter, backbone=backbone, precision=_precision(precision))
    source = read_texts(
        predictor.card, texts, file, sys.stdin, text_column=text, pair_column=text_pair
    )
    write_records(
        answer_records(predictor, source, keep_going=keep_going), out, format, predictor.card.kind
    )


@app.command()
def look(
    adapter: Annotated[Path, typer.Argument(help="Folder of an adapter or of a run.")],
    texts: Annotated[
        list[str] | None,
        typer.Argument(help="Texts; for a task on pairs two after two. None: lines of stdin."),
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="csv, tsv, jsonl, parquet or txt to read.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a page that needs nothing else.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw it, as .svg or .png.")
    ] = None,
    maps: Annotated[
        int, typer.Option(min=0, help="Texts, from the first, whose attention maps are kept.")
    ] = 4,
    backbone: Backbone = None,
    as_json: Json = False,
) -> None:
    """Show what an adapter changes inside the backbone: attention, vertical heads, vectors, outputs.

    The table holds a line for each layer; with many texts its numbers are means over the texts.
    """
    if file is not None and texts:
        raise typer.BadParameter("give texts or --file, not both")
    if picture is not None and picture.suffix not in (".png", ".svg"):
        raise typer.BadParameter(f"--picture is a .png or a .svg, not {picture.name!r}")
    with stderr.status("Looking ..."):
        from pastina.adapter import adapter_folder, read_card
        from pastina.looking.look import look_rows
        from pastina.looking.summary import columns, summary
        from pastina.records import read_texts

        source = read_texts(read_card(adapter_folder(adapter)), texts, file, sys.stdin)
        found = look_rows(adapter, [row for row, _ in source], backbone=backbone, maps=maps)
        written = [found.save_page(html)] if html else []
        written += [found.save_picture(picture)] if picture else []
    if as_json:
        print_json(found.as_dict())
    else:
        print_table(columns(found), summary(found))
    for path in written:
        typer.echo(f"written: {path}", err=True)


@app.command()
def tasks(
    folder: Annotated[Path, typer.Argument(help="A folder with adapters in it.")],
    as_json: Json = False,
) -> None:
    """List the adapters in a folder."""
    from pastina.adapter import list_adapters, size_on_disk
    from pastina.errors import AdapterError

    rows, records = [], []
    for path, card in list_adapters(folder):
        if isinstance(card, AdapterError):
            rows.append([str(path), "broken", str(card)])
            records.append({"path": str(path), "error": str(card)})
            continue
        metric = next(iter(card.metrics.get("dev", {}).items()), ("", float("nan")))
        rows.append(
            [
                str(path),
                card.kind,
                str(len(card.labels)),
                card.method,
                card.backbone.name,
                f"{metric[0]} {metric[1]:.3f}",
                f"{size_on_disk(path) / 1000:.0f}",
                card.digest[:12],
            ]
        )
        records.append(
            {
                "path": str(path),
                "bytes": size_on_disk(path),
                **card.model_dump(mode="json", exclude={"recipe"}),
            }
        )
    if as_json:
        print_json(records)
    elif rows:
        columns = ["task", "kind", "labels", "method", "backbone", "dev", "kB", "digest"]
        print_table(columns, rows)
    else:
        typer.echo(f"No adapters in {folder}.", err=True)


@app.command()
def methods(as_json: Json = False) -> None:
    """List the ways of tuning, with what they fit and their default options."""
    from pastina.methods import METHODS

    records = [
        {
            "name": method.name,
            "title": method.title,
            "paper": method.paper,
            "fits": method.fits,
            "options": method.defaults,
        }
        for method in METHODS.values()
    ]
    if as_json:
        print_json(records)
        return
    rows = [
        [r["name"], r["title"], r["paper"], ", ".join(f"{k}={v}" for k, v in r["options"].items())]
        for r in records
    ]
    print_table(["method", "title", "paper", "options"], rows)


@app.command()
def recipe(
    args: Annotated[
        list[str] | None, typer.Argument(metavar="[RECIPE.toml] [KEY=VALUE]...")
    ] = None,
    as_json: Json = False,
) -> None:
    """Print a recipe with everything filled in."""
    from pastina.recipe import recipe_toml

    resolved = _read(*_recipe_and_overrides(args or [])).resolved()
    if as_json:
        print_json(resolved.model_dump(mode="json"))
    else:
        typer.echo(recipe_toml(resolved), nl=False)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what is installed, which backbones are found and which device is used."""
    from pastina.doctor import examine

    report = examine()
    if as_json:
        print_json(report.as_dict())
    else:
        for section, rows in report.sections():
            print_table([section, "", ""], rows)
    if not report.is_well:
        raise PastinaError(report.complaint)


def _precision(text: str) -> Any:
    if text not in ("auto", "fp32", "bf16", "int8"):
        raise typer.BadParameter(f"--precision is auto, fp32, bf16 or int8, not {text!r}")
    return text


def _read(path: str | None, overrides: Iterable[str]) -> Any:
    from pastina.recipe import read_recipe

    return read_recipe(path, overrides)


def _recipe_and_overrides(args: list[str]) -> tuple[str | None, list[str]]:
    recipes = [arg for arg in args if "=" not in arg]
    if len(recipes) > 1:
        raise typer.BadParameter(f"one recipe at a time; seen {', '.join(recipes)}")
    return (recipes[0] if recipes else None), [arg for arg in args if "=" in arg]


def _output_format(format: str, out: Path | None, as_json: bool) -> str:
    if as_json and format == "csv":
        raise typer.BadParameter("--json and --format csv exclude each other")
    if as_json or not format:
        by_name = "csv" if out is not None and out.suffix == ".csv" else "jsonl"
        return "jsonl" if as_json else by_name
    if format not in ("jsonl", "csv"):
        raise typer.BadParameter(f"--format is jsonl or csv, not {format!r}")
    return format


def _print_run(run: Any, as_json: bool) -> None:
    if as_json:
        print_json(_run_record(run))
        return
    typer.echo(
        f"{run.metric} {run.metrics[run.metric]:.4f} on dev in epoch {run.best_epoch}, "
        f"{run.trained_parameters:,} parameters, {run.seconds:.0f} s",
        err=True,
    )
    typer.echo(f"adapter: {run.adapter} ({run.adapter_bytes / 1000:.0f} kB)")


def _run_record(run: Any) -> dict[str, Any]:
    return {
        "adapter": str(run.adapter),
        "best_epoch": run.best_epoch,
        "dev": run.metrics,
        "trained_parameters": run.trained_parameters,
        "adapter_bytes": run.adapter_bytes,
        "seconds": run.seconds,
    }


if __name__ == "__main__":
    main()

"""Writes the parts of these pages that the code itself knows: keys, defaults, metrics, `--help`.

python docs/generate.py            writes them
python docs/generate.py --check    says which page is out of date, and fails if one is
"""

import json
import re
import statistics
import sys
import tomllib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from typer.testing import CliRunner

from pastina.adapter import BackboneId, Card
from pastina.bench.table import bench_table
from pastina.cli import app
from pastina.kinds import KINDS
from pastina.methods import METHODS
from pastina.presets import PRESETS
from pastina.recipe import (
    METHOD_FIT,
    METHOD_OPTIONS,
    BackboneSpec,
    DataSpec,
    FitSpec,
    HeadSpec,
    Recipe,
)

DOCS = Path(__file__).parent
WIDTH = 92

KEYS = {
    "name": "name of the task; left out: the name of the run's folder",
    "kind": "what goes in and comes out, see [kinds](kinds.md)",
    "preset": "settings below those that the recipe names itself, see [presets](#presets)",
    "backbone.name": "hub id or folder, see [backbones](backbones.md)",
    "backbone.revision": "commit or branch on the hub",
    "backbone.num_layers": "only so many layers, from below; -1: all but the top one; left out: all",
    "method.name": "the way of tuning",
    "method.num_slots": "how many special tokens a text may hold; left out: as many as the "
    "tokenizer puts around a text, or a pair",
    "method.share": "`none`: a vector for each slot; `by_token`: for each special token; "
    "`all`: one for all slots of a layer",
    "method.layers": "layers that get vectors, counted from 0; left out: all",
    "method.init_std": "spread of the first values; 0 starts at the frozen backbone",
    "method.dropout": "dropout on the vectors",
    "method.special_token_ids": "ids that count as special; left out: the tokenizer's",
    "method.slots": "slots that have vectors: `all`, `first`, `rest`, or a list counted from 0; see "
    "[variants](pasta.md#variants)",
    "method.layer_slots": "for each layer the one slot that has a vector there",
    "method.positions": "as a control, `first` or `random` ordinary tokens instead of special ones",
    "method.everywhere": "one more vector in each layer, for every token",
    "method.scale": "a learned factor beside each vector",
    "method.bias_layers": "layers, counted from 0, of whose products and norms the biases learn as "
    "well; left out: of none",
    "method.rank": "rank of a product of every token's state that is added as well; 0: none",
    "method.at": "`keys-values`: only what keys and values are made of is changed",
    "method.extra_tokens": "how often the last special token is written again, each time with a slot",
    "data.folder": "stands in front of train, dev, test and of a local hub folder",
    "data.train": "file with training rows; with `data.hub` the name of a split",
    "data.dev": "file that picks the best epoch; left out: drawn from train",
    "data.test": "file that only `pastina evaluate` reads",
    "data.format": "`auto`: by the ending of the file, see [data](data.md)",
    "data.hub": "hub id, a GLUE task such as `glue/rte`, or a folder that `datasets` can load",
    "data.config": "configuration of the hub data set",
    "data.text": "column of the text; left out: found by name",
    "data.text_pair": "column of the second text",
    "data.label": "column of the label",
    "data.dev_share": "share of train that becomes dev where there is no dev part",
    "data.dev_rows": "at most so many dev rows, drawn by the seed; where there is no dev part, so many "
    "become dev instead of a share",
    "data.limit": "at most so many training rows, drawn by the seed",
    "data.max_length": "tokens of an input, special ones included; longer texts are cut, or seen "
    "through windows by a tagger",
    "data.stride": "tokens that two neighbouring windows of a tagger share",
    "data.align": "a span that cuts a word: an error, or it grows to the whole word",
    "head.pooling": "what the head reads, see [kinds](kinds.md#what-the-head-reads)",
    "head.dropout": "dropout in front of the head",
    "fit.lr": "learning rate of what learns in the backbone; left out: the method's",
    "fit.head_lr": "learning rate of the head; left out: the method's",
    "fit.epochs": "times that all training rows are seen; left out: the method's own",
    "fit.batch": "rows of a step, over all processes together",
    "fit.weight_decay": "AdamW's, on matrices only",
    "fit.adam_eps": "AdamW's epsilon",
    "fit.warmup": "share of all steps in which the rate rises",
    "fit.schedule": "after the warm-up: falls to 0 in a line or along a cosine, or stays",
    "fit.layer_decay": "factor of the rate from each layer to the one below; 1: all layers alike",
    "fit.layer_rates": "factors of `fit.lr`, one for each layer of the backbone from below; left out: "
    "all alike",
    "fit.slot_rates": "factors of `fit.lr`, one for each vector of a layer (`pasta`), without the one "
    "for every token; left out: all alike",
    "fit.everywhere_lr": "learning rate of the vectors for every token (`method.everywhere`); left out: "
    "`fit.lr`",
    "fit.rank_lr": "learning rate of the products (`method.rank`); left out: `fit.lr`",
    "fit.bias_lr": "learning rate of the biases (`method.bias_layers`); left out: that of BitFit, 3e-3",
    "fit.label_smoothing": "share of the target that goes to all classes alike (classify, tag)",
    "fit.consistency": "weight of how far the answers under two dropout masks are apart; each row "
    "counts twice in a batch",
    "fit.teacher": "folder of a run on the same labels, whose answers are learned as well",
    "fit.teacher_weight": "share of the teacher in the loss",
    "fit.teacher_temperature": "by which both answers are divided before they are compared",
    "fit.ema": "decay of a moving average of what learns; the average is scored and kept",
    "fit.clip": "largest norm of the gradient; 0: no limit",
    "fit.patience": "stop after so many epochs without a better dev metric; left out: never",
    "fit.score_every": "epochs between two scores of the dev rows; the last epoch is always scored",
    "fit.class_weights": "`balanced`, or a table such as `{ spam = 5.0 }`",
    "fit.precision": "of products with frozen weights; `auto`: bf16 where that is fast, else fp32",
    "fit.metric": "the dev metric that picks the best epoch; left out: the first of the kind",
    "fit.seed": "of the head, the vectors, the order of rows, the drawn dev part",
    "fit.report_to": 'names of accelerate\'s trackers, such as `["tensorboard"]`',
    "fit.save_seconds": "between two resumable states; 0: after each step",
}

OPTIONS = {
    "lora.r": "rank",
    "lora.alpha": "the product counts alpha / r times",
    "lora.dropout": "dropout in front of the product",
    "lora.parts": "which products of a layer get one; `up`, `down`: of the feed-forward net",
    "lora.targets": "a pattern of module names instead of `parts`",
    "ia3.targets": "a pattern of all modules that are scaled; left out: keys, values and "
    "feed-forward nets",
    "ia3.feedforward": "a pattern of those of them that are scaled at their input",
    "bitfit.biases": "all, or those of the queries and of the first feed-forward product",
    "bitfit.add": "whether products of the layers that have no bias get one",
    "bottleneck.style": "where the nets stand",
    "bottleneck.reduction": "how many times narrower than the layer; left out: 16, of `parallel` 2",
    "bottleneck.activation": "left out: `relu`, of `houlsby` `silu`",
    "bottleneck.scaling": "how many times a net counts; left out: 1, of `parallel` 4",
    "prefix_tuning.num_virtual_tokens": "P",
    "prefix_tuning.inner_size": "width of the net that makes the prefixes",
    "p_tuning_v2.num_virtual_tokens": "P",
    "prompt_tuning.num_virtual_tokens": "P",
    "prompt_tuning.init": "they begin as words drawn from the vocabulary, or at random",
    "trainable_tokens.special_token_ids": "whose rows learn; left out: the tokenizer's special tokens",
    "peft.type": "as PEFT writes it, such as `VERA`",
    "peft.config": "what PEFT's config of this type takes",
}

CARD = {
    "format": "version of this file's layout",
    "name": "name of the task",
    "kind": "classify, multilabel, regress or tag",
    "labels": "class names or span types, in the order of the head; empty for regress",
    "method": "the way of tuning",
    "is_pair": "whether the task reads two texts",
    "pooling": "what the head reads",
    "max_length": "tokens of an input",
    "stride": "tokens that two windows of a tagger share",
    "target_mean": "regress: mean of the training targets",
    "target_std": "regress: their standard deviation; the head answers in units of it",
    "backbone.name": "hub id or folder",
    "backbone.revision": "commit on the hub, where one was named",
    "backbone.num_layers": "the lowest so many layers are used; null: all",
    "backbone.digest": "SHA-256 of the weights",
    "backbone.tokenizer_digest": "SHA-256 of the tokenizer",
    "backbone.config_digest": "SHA-256 of what its two config files say about the use of both",
    "trained_parameters": "how many numbers were trained",
    "metrics": "by part, such as `metrics.dev.accuracy`",
    "recipe": "the whole recipe, to train it again",
    "versions": "of pastina, Python, torch, transformers and peft",
    "created": "date and time, UTC",
    "digest": "SHA-256 over vectors, head, PEFT's config and this card",
}


def keys() -> str:
    """The table of all keys of a recipe."""
    rows = list(_recipe_rows())
    _check_described(KEYS, [row[0] for row in rows])
    lines = []
    for key, field in rows:
        values = ", ".join(f"`{m}`" for m in METHODS) if key == "method.name" else _values(field)
        lines.append(f"| `{key}` | {values} | {_default(field)} | {KEYS[key]} |")
    return _table("| key | values | default | meaning |", lines)


def _recipe_rows() -> Iterator[tuple[str, FieldInfo]]:
    sections = {"backbone": BackboneSpec, "data": DataSpec, "head": HeadSpec, "fit": FitSpec}
    for name, field in Recipe.model_fields.items():
        if name == "method":
            for option, inner in METHOD_OPTIONS["pasta"].model_fields.items():
                yield f"method.{option}", inner
        elif name in sections:
            for option, inner in sections[name].model_fields.items():
                yield f"{name}.{option}", inner
        else:
            yield name, field


def options() -> str:
    """The table of the options of the methods beside PASTA."""
    rows = {
        f"{name}.{key}": field
        for name, option in METHOD_OPTIONS.items()
        for key, field in option.model_fields.items()
        if key != "name" and name != "pasta"
    }
    _check_described(OPTIONS, list(rows))
    lines = []
    for row, field in rows.items():
        name, _, key = row.partition(".")
        default = "must be named" if field.is_required() else _default(field)
        lines.append(f"| `{name}` | `{key}` | {_values(field)} | {default} | {OPTIONS[row]} |")
    return _table("| method | key below `method` | values | default | meaning |", lines)


def rates() -> str:
    """The learning rates and epochs of each method."""
    lines = [
        f"| `{name}` | {own.lr:g} | {own.head_lr:g} | {own.epochs} |"
        for name, own in METHOD_FIT.items()
    ]
    return _table("| method | `fit.lr` | `fit.head_lr` | `fit.epochs` |", lines)


def presets() -> str:
    """What each preset stands for."""
    lines = [
        f"| `{name}` | "
        + ", ".join(
            f"`{section}.{key}={_toml(value)}`"
            for section, settings in preset.items()
            for key, value in settings.items()
        )
        + " |"
        for name, preset in PRESETS.items()
    ]
    return _table("| preset | settings |", lines)


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{key} = {_toml(own)}' for key, own in value.items())} }}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def methods() -> str:
    """The table of methods."""
    lines = [
        f"| `{m.name}` | {m.title} | {m.fits} | {m.paper.removeprefix('https://')} |"
        for m in METHODS.values()
    ]
    return _table("| method | title | fits | paper |", lines)


def metrics() -> str:
    """The metrics of each kind."""
    lines = [
        f"| {kind.name} | {', '.join(f'`{name}`' for name in kind.metrics)} |"
        for kind in KINDS.values()
    ]
    return _table("| kind | metrics |", lines)


def card() -> str:
    """The table of the fields of task.json."""
    names = [
        inner
        for name in Card.model_fields
        for inner in (
            [f"backbone.{part}" for part in BackboneId.model_fields]
            if name == "backbone"
            else [name]
        )
    ]
    _check_described(CARD, names)
    return _table("| field | meaning |", [f"| `{name}` | {CARD[name]} |" for name in names])


def commands() -> str:
    """What `--help` says, for pastina and each of its commands."""
    pages = [_section(" ".join(["pastina", *words]), words) for words in [[], *_registered(app)]]
    return "\n\n".join(pages)


def _registered(commands: Any) -> Iterator[list[str]]:
    """The words of each command, those of a group of commands behind the group's name."""
    for command in commands.registered_commands:
        yield [command.name or command.callback.__name__]
    for group in commands.registered_groups:
        yield from ([group.name, *words] for words in _registered(group.typer_instance))


def _section(title: str, args: list[str]) -> str:
    result = CliRunner().invoke(app, [*args, "--help"], prog_name="pastina", terminal_width=WIDTH)
    assert result.exit_code == 0, result.output
    return f"## {title}\n\n```text\n{result.output.strip()}\n```"


def first_table() -> str:
    """results/first-table.json, a row for each data set; the gap is taken on the test part."""
    cells = _cells()
    lines, shares = [], []
    for name in dict.fromkeys(name for name, _ in cells):
        row = [cells.get((name, method)) for method in ("linear", "pasta", "full")]
        share = _gap_closed(*(None if cell is None else cell["test"] for cell in row))
        shares += [] if share is None else [share]
        metric = next(cell["metric"] for cell in row if cell is not None)
        trained = "" if row[1] is None else f"{row[1]['trained_parameters']:,}"
        seconds = " / ".join("" if cell is None else f"{cell['seconds']:.0f}" for cell in row)
        scores = " | ".join(_points(cell) for cell in row)
        closed = "" if share is None else f"{100 * share:.0f} %"
        lines.append(f"| {name} | {metric} | {scores} | {closed} | {trained} | {seconds} |")
    if shares:
        mean = 100 * sum(shares) / len(shares)
        lines.append(f"| mean of {len(shares)} | | | | | {mean:.0f} % | | |")
    return _table(
        "| data | metric | linear probe | PASTA | full | gap closed | numbers PASTA trains "
        "| seconds, in this order |",
        lines,
    )


def precision() -> str:
    """results/precision.json: the dev metric in fp32, and what other precisions change.

    What training in them changes is the mean over seeds, ± its standard error.
    """
    path = DOCS.parent / "results" / "precision.json"
    entries = json.loads(path.read_text(encoding="utf-8"))
    lines = []
    for name in dict.fromkeys(entry["data"] for entry in entries):
        own = {entry["precision"]: entry for entry in entries if entry["data"] == name}
        exact = own["fp32"]
        seeds = exact["train_by_seed"]
        cells = [name, exact["metric"], str(len(seeds)), f"{100 * exact['train']:.1f}"]
        for other in ("bf16", "int8"):
            found = own.get(other, {}).get("train_by_seed", {})
            changes = [100 * (found[s] - seeds[s]) for s in seeds if s in found]
            cells.append(_mean_and_error(changes))
        for other in ("bf16", "int8"):
            change = 100 * (own[other]["predict"] - exact["predict"]) if other in own else None
            cells.append("" if change is None else f"{change:+.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    return _table(
        "| data | metric | seeds | fp32 | train bf16 | train int8 | predict bf16 | predict int8 |",
        lines,
    )


def answer_precision() -> str:
    """results/answer-precision.json: the dev metric in fp32 of adapters trained as by default.

    What other precisions of answers change is the mean over seeds, ± its standard error.
    """
    path = DOCS.parent / "results" / "answer-precision.json"
    lines = []
    for entry in json.loads(path.read_text(encoding="utf-8")):
        exact = entry["by_seed"]["fp32"]
        cells = [entry["data"], entry["metric"], f"{100 * statistics.fmean(exact):.1f}"]
        for other in ("bf16", "int8"):
            pairs = zip(entry["by_seed"][other], exact, strict=True)
            cells.append(_mean_and_error([100 * (found - own) for found, own in pairs]))
        lines.append("| " + " | ".join(cells) + " |")
    return _table("| data | metric | answers in fp32 | bf16 | int8 |", lines)


def _mean_and_error(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:+.1f}" if values else ""
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.fmean(values):+.1f} ± {error:.1f}"


# key of results/speed.json -> what it is, and the goal
FIGURES = {
    "train_clinc150_fp32": ("training on CLINC150 in fp32, against Trainer + LoRA", "≥ 3.0"),
    "train_clinc150_int8": ("the same in int8", "≥ 5"),
    "train_clinc150_bf16": ("the same in bf16", ""),
    "train_clinc150_fp32_mean": ("the same in fp32, a head on the mean of all tokens", ""),
    "train_clinc150_int8_mean": ("int8, mean of all tokens", ""),
    "train_clinc150_bf16_mean": ("bf16, mean of all tokens", ""),
    "train_qnli_fp32": ("training on QNLI in fp32, against Trainer + LoRA", "≥ 4.2"),
    "train_qnli_int8": ("the same in int8", "≥ 7"),
    "train_qnli_bf16": ("the same in bf16", ""),
    "train_qnli_fp32_mean": ("the same in fp32, a head on the mean of all tokens", ""),
    "train_qnli_int8_mean": ("int8, mean of all tokens", ""),
    "train_qnli_bf16_mean": ("bf16, mean of all tokens", ""),
    "train_floor_share_qnli": ("training on QNLI in fp32: share of the floor", "≥ 0.85"),
    "predict_clinc150_fp32": ("CLINC150's test file in fp32, against the pipeline", "≥ 2.0"),
    "predict_clinc150_int8": ("the same in int8", "≥ 4"),
    "predict_clinc150_bf16": ("the same in bf16", ""),
    "batch_64_tasks": ("64 rows of 64 tasks: time against 1 task", "≤ 1.05"),
    "resident_1000_time": ("1,000 tasks in memory: time of a batch against 1", "≤ 1.02"),
    "resident_1000_mb": ("1,000 tasks in memory: MB", "≤ 100"),
    "load_1000_s": ("loading 1,000 adapters: seconds", "≤ 3"),
    "load_last_vs_first": ("loading: the last hundred against the first", "≤ 1.2"),
    "fleet_16_cpu": ("16 runs as a fleet, against one after the other", "≥ 1.5"),
    "fleet_16_gpu": ("the same on a GPU", "≥ 8"),
}


def speed() -> str:
    """results/speed.json beside the goals."""
    path = DOCS.parent / "results" / "speed.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    lines = []
    for key, (what, goal) in FIGURES.items():
        value = found.get(key)
        seen = "not measured" if value is None else f"{value:.2f}"
        lines.append(f"| {what} | `{key}` | {seen} | {goal} |")
    machine, versions = found["machine"], found["versions"]
    return (
        _table("| figure | key | measured | goal |", lines)
        + f"\n\n{machine['cores']} cores of {machine['cpu']}, {machine['threads']} threads, torch "
        f"{versions['torch']}, transformers {versions['transformers']}, peft {versions['peft']}."
    )


SETTINGS = {
    "folder": "of the adapters, or an address of fsspec",
    "backbone": "folder or hub id; left out: that of the adapters",
    "precision": "of products with frozen weights, see [engine](engine.md)",
    "threads": "of the engine; 0: torch decides",
    "host": "address to listen on",
    "port": "0: a free one, which the log names",
    "tokens": "file of tokens; left out: this machine only",
    "uploads": "let admin tokens upload and delete",
    "default_task": "the task that `/predict` asks",
    "max_tokens": "tokens of a batch",
    "wait_ms": "how long a batch waits for more after a pause, under load",
    "deadline_s": "seconds for a request at most",
    "poll_s": "seconds between two looks at the folder; more where a look takes long",
    "max_chars": "characters of a text, or of a pair",
    "max_texts": "texts of a request; 4,096 at most",
    "max_body": "bytes of a request's body",
    "max_upload": "bytes of an archive, and of what it unpacks to",
    "queue_texts": "texts that wait; more get 429, but for callers with little in the queue",
    "queue_chars": "their characters",
    "connections": "requests at once, one a connection; more get 503",
    "read_s": "seconds in which a body must have come; for an upload six times that",
    "stop_s": "seconds that running requests get when the server ends",
    "metric_tasks": "tasks that are counted by name",
    "log_level": "of the log",
}


def settings_of_a_server() -> str:
    """The table of all settings."""
    from pastina.serve.settings import Settings

    _check_described(SETTINGS, list(Settings.model_fields))
    lines = []
    for name, field in Settings.model_fields.items():
        default = "" if field.is_required() else _default(field)
        lines.append(f"| `{name}` | {default} | {SETTINGS[name]} |")
    return _table("| setting | default | meaning |", lines)


# key of results/serve.json -> what it is, and the goal
SERVE_FIGURES = {
    "served_share_1000": (
        "64 connections, a short text a request, 1,000 tasks: texts/s over the engine's own",
        "≥ 0.7",
    ),
    "served_1000_vs_1": (
        "the same with 1,000 tasks, over 1 task of as many classes as they have on average",
        "≥ 0.97",
    ),
    "p50_forwards": (
        "median latency at half of that load, in bare forwards of one text (transformers, fp32)",
        "≤ 3",
    ),
    "p99_forwards": ("99th percentile", "≤ 8"),
    "p50_engine_forwards": (
        "the median in forwards by the engine, which is faster",
        "reported",
    ),
    "p99_engine_forwards": ("99th percentile", "reported"),
    "start_1000_s": ("start with 1,000 adapters: seconds after the imports", "≤ 8"),
    "fuzz_5xx": ("schemathesis and 2,000 broken archives: answers from 500 on, crashes", "0"),
    "fuzz_escaped": ("files that came to lie outside of the folder", "0"),
    "soak_wrong": ("10 minutes, a task replaced each second: wrong answers", "0"),
    "soak_5xx": ("answers from 500 on", "0"),
    "soak_growth": ("growth of memory after the first minute", "≤ 0.05"),
}


def serve() -> str:
    """results/serve.json beside the goals, and the comparison with others."""
    path = DOCS.parent / "results" / "serve.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    lines = []
    for key, (what, goal) in SERVE_FIGURES.items():
        value = found.get(key)
        if value is None and goal == "reported":
            continue
        seen = "not measured" if value is None else f"{value:g}"
        lines.append(f"| {what} | `{key}` | {seen} | {goal} |")
    parts = [_table("| figure | key | measured | goal |", lines)]
    curve = found.get("curves", {}).get("serve")
    if curve is not None:
        rows = []
        for name, rates in curve["texts_per_s"].items():
            measures = zip(rates, curve["mb"][name], curve["ready_s"][name], strict=True)
            cells = [
                "–" if rate is None else f"{rate:,.0f} / {mb:,.0f} / {ready:,.0f}"
                for rate, mb, ready in measures
            ]
            rows.append("| " + " | ".join([name, *cells]) + " |")
        head = "".join(f" {count:,} |" for count in curve["x"])
        parts.append("Texts a second / memory in MB / seconds until ready, by the number of tasks:")
        parts.append(_table(f"| |{head}", rows))
        parts += [f"{name}: {note}." for name, note in found["notes"].items()]
    if found:
        machine, versions = found["machine"], found["versions"]
        groups: dict[int, list[str]] = {}
        for group, about in found["groups"].items():
            groups.setdefault(about["threads"], []).append(group)
        threads = "; ".join(
            f"{', '.join(own)}: {count} thread{'s' * (count != 1)}" for count, own in groups.items()
        )
        parts.append(
            f"{machine['cores']} cores of {machine['cpu']} ({threads}), torch {versions['torch']}, "
            f"transformers {versions['transformers']}, peft {versions['peft']}."
        )
    return "\n\n".join(parts)


def summary() -> str:
    """The test scores of the first table, for the README."""
    cells = _cells()
    lines = []
    for name in dict.fromkeys(name for name, _ in cells):
        row = [cells.get((name, method)) for method in ("linear", "pasta", "full")]
        scores = " | ".join("" if cell is None else f"{100 * cell['test']:.1f}" for cell in row)
        trained = "" if row[1] is None else f"{row[1]['trained_parameters']:,}"
        lines.append(f"| {name} | {scores} | {trained} |")
    return _table("| test set | linear probe | PASTA | full | numbers PASTA trains |", lines)


def _points(cell: dict[str, Any] | None) -> str:
    return "" if cell is None else f"{100 * cell['dev']:.1f} / {100 * cell['test']:.1f}"


def settings() -> str:
    """How the first table was made, from the result files themselves."""
    cells = list(_cells().values())
    machine, versions = cells[0]["machine"], cells[0]["versions"]
    lines = []
    for method in ("linear", "pasta", "full"):
        fit = next(e for e in cells if e["method"] == method)["recipe"]["fit"]
        lines.append(
            f"| {method} | {fit['lr']:g} | {fit['head_lr']:g} | {fit['epochs']} | {fit['batch']} |"
        )
    rows = max(e["rows"]["train"] for e in cells)
    return (
        _table("| method | fit.lr | fit.head_lr | fit.epochs | fit.batch |", lines)
        + f"\n\nSeed {cells[0]['seed']}, up to {rows:,} training rows, {machine['cores']} CPU cores, "
        f"torch {versions['torch']}, transformers {versions['transformers']}, peft {versions['peft']}."
    )


def _cells() -> dict[tuple[str, str], dict[str, Any]]:
    path = DOCS.parent / "results" / "first-table.json"
    return {(e["data"], e["method"]): e for e in json.loads(path.read_text(encoding="utf-8"))}


def _gap_closed(floor: float | None, seen: float | None, ceiling: float | None) -> float | None:
    """The share of the gap, where there is one to speak of: two points or more."""
    if floor is None or seen is None or ceiling is None or ceiling - floor < 0.02:
        return None
    return (seen - floor) / (ceiling - floor)


def grids() -> str:
    """What the grids of recipes/bench hold."""
    lines = []
    for path in sorted((DOCS.parent / "recipes" / "bench").glob("*.toml")):
        grid = tomllib.loads(path.read_text(encoding="utf-8"))
        sizes = grid.get("sizes", [])
        own = grid.get("sets", {})
        cells = sum(len(own.get(name, {}).get("sizes", sizes)) or 1 for name in grid["recipes"])
        rates = [len(method["rates"]) for method in grid["methods"].values()]
        seeds = len(grid["seeds"])
        runs = sum(cells * (count + seeds - 1) for count in rates)
        told = ", ".join(f"{size:,}" for size in sizes) or "all, or a cut"
        limit = grid.get("base", {}).get("data", {}).get("limit")
        lines.append(
            f"| [{path.stem}](../recipes/bench/{path.name}) | {len(rates)} | {len(grid['recipes'])} | "
            f"{f'up to {limit:,}' if limit else told} | {seeds} | {rates[0]} | {runs} |"
        )
    return _table("| grid | methods | data sets | training rows | seeds | rates | runs |", lines)


def grid_results(name: str) -> str:
    """The table of a grid, or how to make it."""
    folder = DOCS.parent / "results" / name
    if not (folder / "grid.json").is_file():
        return f"Not run yet: `pastina bench run recipes/bench/{name}.toml`"
    return bench_table(folder).strip()


def candidates() -> str:
    """results/gap-trials.json: what is changed alone, in how many sets it is above plain PASTA."""
    path = DOCS.parent / "results" / "gap-trials.json"
    scores: dict[str, dict[tuple[str, int], float]] = {}
    for entry in json.loads(path.read_text(encoding="utf-8"))["trials"]:
        if "score" in entry:
            scores.setdefault(entry["variant"], {})[entry["data"], entry["seed"]] = entry["score"]
    plain = scores["plain"]
    rows = []
    for variant, found in scores.items():
        if variant == "everywhere" or variant.startswith("plain-"):
            apart: dict[str, list[float]] = {}
            for data, seed in found:
                gain = 100 * (found[data, seed] - plain[data, seed])
                apart.setdefault(data, []).append(gain)
            gains = [statistics.fmean(own) for own in apart.values()]
            wins = sum(gain > 0 for gain in gains)
            seeds = len({seed for _, seed in found})
            if len(gains) >= 5:  # others were tried here and there
                rows.append((wins, statistics.fmean(gains), variant, seeds, gains))
    lines = [
        f"| {variant} | {seeds} | {wins} of {len(gains)} | {mean:+.1f} | {min(gains):+.1f} "
        f"| {max(gains):+.1f} |"
        for wins, mean, variant, seeds, gains in sorted(rows, key=lambda row: row[:2])[::-1]
    ]
    return _table("| variant | seeds | sets won | points, mean | least | most |", lines)


def trials() -> str:
    """results/gap-trials.json: a row for each variant that was tried, with its best score on dev."""
    path = DOCS.parent / "results" / "gap-trials.json"
    every = json.loads(path.read_text(encoding="utf-8"))["trials"]
    entries = [entry for entry in every if entry["seed"] == every[0]["seed"]]
    sets = list(dict.fromkeys(entry["data"] for entry in entries))
    lines = []
    for variant in dict.fromkeys(entry["variant"] for entry in entries):
        own = [entry for entry in entries if entry["variant"] == variant]
        scores = {d: [e["score"] for e in own if e["data"] == d and "score" in e] for d in sets}
        points = [f"{100 * statistics.fmean(s):.1f}" if s else "" for s in scores.values()]
        said = own[0]["method"] | own[0]["fit"]
        words = " ".join(f"{k}={_toml(v)}" for k, v in said.items() if k not in ("precision",))
        lines.append(f"| {variant} | {' | '.join(points)} | `{words}` |")
    rows = entries[0]["rows"]
    return (
        _table(f"| variant | {' | '.join(sets)} | settings |", lines)
        + f"\n\nPoints on dev at the best epoch; {rows['limit']} training and {rows['dev_rows']} dev "
        f"rows, seed {entries[0]['seed']}, {entries[0]['fit']['precision']}."
    )


LAYERED = ("linear", "pasta", "pasta-wide", "lora", "full")


def layers() -> str:
    """results/gap by the number of layers, with the first seed: the best score on dev of what else a
    method could choose."""
    folder = DOCS.parent / "results" / "gap"
    grid = json.loads((folder / "grid.json").read_text(encoding="utf-8"))
    best: dict[tuple[str, str, int | None], float] = {}
    for path in sorted(folder.glob("*/*.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        if run["seed"] != grid["seeds"][0]:
            continue  # of the choices that won alone
        key = run["method"], run["data"], run["rate"].get("num_layers")
        best[key] = max(best.get(key, -1.0), run["dev"][run["metric"]])
    names = list(dict.fromkeys(data for data, _, _ in grid["cells"]))
    lines = []
    for method in LAYERED:
        for num_layers, words in ((None, "all"), (-1, "without the top one")):
            own = [f"{100 * best[method, data, num_layers]:.1f}" for data in names]
            lines.append(f"| {method} | {words} | {' | '.join(own)} |")
    return _table(f"| method | layers | {' | '.join(names)} |", lines)


# key of results/evidence.json -> what it is, and the goal
EVIDENCE = {
    "gap_closed_pasta": ("share of the gap that plain PASTA closes", "reported"),
    "gap_closed_best": ("share of the gap that the best preset closes", "≥ 0.95"),
    "gap_closed_best_where_apart": ("over the sets whose ends are 2 points apart", "reported"),
    "gap_closed_best_pooled": ("of the mean gap", "reported"),
    "gap_closed_best_by_seed": ("worked out for each seed, then the mean", "reported"),
    "gap_closed_best_sd": ("standard deviation of that over seeds", "reported"),
    "gap_closed_small": (
        "share of the gap that the preset of a tenth of LoRA's size closes",
        "reported",
    ),
    "gap_closed_lora": ("share of the gap that LoRA closes, for comparison", "reported"),
    "best_vs_lora": ("the preset of a tenth of its size against LoRA, points", "≥ -0.3"),
    "best_vs_lora_parameters": ("its adapter parameters, as a share of LoRA's", "≤ 0.1"),
    "best_vs_lora_parameters_largest": ("the largest such share of a data set", "reported"),
    "best_vs_lora_where_small": ("points over the data sets with at most a tenth", "reported"),
    "special_vs_ordinary": ("special tokens against ordinary positions, points", "reported"),
    "special_vs_ordinary_p": ("p of it", "reported"),
}


def evidence() -> str:
    """results/evidence.json beside the goals, and how each figure was computed."""
    path = DOCS.parent / "results" / "evidence.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    lines = []
    for key, (what, goal) in EVIDENCE.items():
        value = found.get(key)
        seen = "not measured" if value is None else f"{value:.3g}"
        lines.append(f"| {what} | `{key}` | {seen} | {goal} |")
    words = [f"- `{key}`: {text}" for key, text in found.get("how", {}).items()]
    table = _table("| figure | key | measured | goal |", lines)
    return "\n".join([table, "", *words]) if words else table


PARTS: dict[str, dict[str, Callable[[], str]]] = {
    "../README.md": {"summary": summary},
    "results.md": {"first-table": first_table, "settings": settings},
    "recipes.md": {"keys": keys, "rates": rates, "presets": presets},
    "methods.md": {"methods": methods, "options": options},
    "kinds.md": {"metrics": metrics},
    "adapters.md": {"card": card},
    "benchmark.md": {
        "grids": grids,
        "evidence": evidence,
        "trials": trials,
        "candidates": candidates,
        "layers": layers,
        **{
            name: partial(grid_results, name)
            for name in (
                "gap",
                "fewrows",
                "positions",
                "cuts",
                "methods",
                "main",
                "lowdata",
                "ablations",
                "smoke",
            )
        },
    },
    "cli.md": {"commands": commands},
    "engine.md": {"precision": precision, "answer precision": answer_precision},
    "speed.md": {"speed": speed},
    "serving.md": {"settings": settings_of_a_server, "serve": serve},
}


def fresh(page: str) -> str:
    """The text of a page with its generated parts written anew."""
    text = (DOCS / page).read_text(encoding="utf-8")
    for name, write in PARTS[page].items():
        begin, end = f"<!-- generated: {name} -->", f"<!-- end: {name} -->"
        pattern = re.escape(begin) + ".*?" + re.escape(end)
        new = f"{begin}\n\n{write()}\n\n{end}"
        text, count = re.subn(pattern, lambda _, new=new: new, text, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"docs/{page}: {count} parts {begin} ... {end} instead of one")
    return text


def _check_described(described: dict[str, str], names: list[str]) -> None:
    if wrong := set(described) ^ set(names):
        raise SystemExit(f"docs/generate.py: describe these, or drop them: {sorted(wrong)}")


def _table(head: str, lines: list[str]) -> str:
    rule = "|" + "---|" * (head.count("|") - 1)
    return "\n".join([head, rule, *lines])


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value == {}:
        return ""
    if isinstance(value, BaseModel):
        raise TypeError("sections have no default of their own")
    if value is None:
        return ""
    if isinstance(value, str):
        return f'`"{value}"`'
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{list(value) if isinstance(value, tuple) else value}`"


def _values(field: FieldInfo) -> str:
    limits = [
        f"{words} {getattr(limit, sign):g}"
        for limit in field.metadata
        for sign, words in (("ge", "from"), ("gt", "above"), ("lt", "below"), ("le", "up to"))
        if hasattr(limit, sign)
    ]
    return ", ".join([_type(field.annotation), *limits])


def _type(annotation: Any) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(inner[0])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin in (Union, UnionType):
        return " or ".join(_type(part) for part in inner if part is not type(None))
    if origin is tuple:
        is_choice = get_origin(inner[0]) is Literal
        return f"list of {_type(inner[0])}" + ("" if is_choice else "s")
    if origin is dict:
        return "table"
    return {str: "text", int: "whole number", float: "number", bool: "true or false"}[annotation]


def main() -> int:
    """Write the pages, or with --check compare them; the exit code."""
    stale = [page for page in PARTS if (DOCS / page).read_text(encoding="utf-8") != fresh(page)]
    if "--check" in sys.argv[1:]:
        for page in stale:
            print(f"docs/{page} is out of date. Run: python docs/generate.py")
        return 1 if stale else 0
    for page in stale:
        (DOCS / page).write_text(fresh(page), encoding="utf-8")
        print(f"docs/{page} written")
    return 0


if __name__ == "__main__":
    sys.exit(main())

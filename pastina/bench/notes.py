"""The lines below a table: how its numbers came about, and what limits them."""

from collections.abc import Iterator
from typing import Any

from pastina.bench.grid import Settings
from pastina.bench.results import Record, rates_of
from pastina.bench.tally import Tally

_SHOWN = 5  # failures that are spelled out


def notes(tally: Tally) -> list[str]:
    """Sentences, from the result files alone."""
    records = list(tally.goods())
    if not records:
        return [*_failures(tally), *_missing(tally), *_others(tally)]
    return [
        _scores(tally, records),
        *_on_dev(tally),
        _rows(tally, records),
        _epochs(tally),
        _choice(tally),
        *_edges(tally),
        _cost(tally, records),
        *_missing(tally),
        *_others(tally),
        *_failures(tally),
        _machine(records),
    ]


def _scores(tally: Tally, records: list[Record]) -> str:
    metrics: dict[str, list[str]] = {}
    for record in records:
        names = metrics.setdefault(record["metric"], [])
        if record["data"] not in names:
            names.append(record["data"])
    parts = "; ".join(f"{metric} for {', '.join(names)}" for metric, names in metrics.items())
    return (
        f"Points on the test part, mean ± standard deviation over the seeds {_listed(tally.seeds)}: "
        f"{parts}. The epoch is the best one on dev."
    )


def _on_dev(tally: Tally) -> Iterator[str]:
    if any(result.is_on_dev for result in tally.results.values()):
        yield (
            "* no test row of a data set has a label: its best epoch on dev is shown, which flatters, "
            "also in the mean."
        )


def _others(tally: Tally) -> Iterator[str]:
    if tally.num_others:
        yield f"Not counted: {tally.num_others} results of other settings than the grid has now."


def _rows(tally: Tally, records: list[Record]) -> str:
    seen: dict[str, str] = {}
    for record in records:
        rows = record["rows"]
        name = record["data"] if record["size"] is None else f"{record['data']}-{record['size']}"
        seen.setdefault(name, f"{name} {rows['train']:,} / {rows['dev']:,} / {rows['test']:,}")
    limits = _different(r["recipe"]["data"].get("limit") for r in records if r["size"] is None)
    cut = f" At most {limits} training rows, drawn by the seed." if limits else ""
    lengths = _different(r["recipe"]["data"]["max_length"] for r in records)
    return (
        f"Rows to train / choose on / test: {'; '.join(seen.values())}.{cut} Texts are cut at {lengths} "
        "tokens."
    )


def _different(values: Iterator[Any]) -> str:
    return " or ".join(f"{value:,}" for value in sorted({v for v in values if v is not None}))


def _epochs(tally: Tally) -> str:
    """Of each method; more than one where its cells differ."""
    parts = []
    for method in tally.methods:
        own = {r["recipe"]["fit"]["epochs"] for r in tally.goods() if r["method"] == method}
        if own:
            parts.append(f"{method} {' or '.join(map(str, sorted(own)))}")
    return f"Epochs: {', '.join(parts)}."


def _choice(tally: Tally) -> str:
    lists = dict(tally.summary["rates"])
    for method, own in tally.summary.get("kind_rates", {}).items():
        lists |= {f"{method} (kind {kind})": rates for kind, rates in own.items()}
    tried = "; ".join(
        f"{name} {', '.join(_rate(rate) for rate in rates)}" for name, rates in lists.items()
    )
    counts = {len(rates) for rates in lists.values()}
    fair = f"{counts.pop()} for each method" if len(counts) == 1 else "not as many for each method"
    return (
        f"Rates, {fair}, chosen on dev for each data set with seed {tally.seeds[0]}: {tried} "
        "(fit.lr / fit.head_lr)."
    )


def _rate(rate: Settings) -> str:
    parts = [f"{rate[key]:g}" if key in rate else "·" for key in ("lr", "head_lr")]
    told = " / ".join(parts)
    if "epochs" in rate:
        told += f" for {rate['epochs']} epochs"
    if isinstance(num_layers := rate.get("num_layers"), int):
        count, what = abs(num_layers), "layer" + "s" * (abs(num_layers) > 1)
        told += f" on {count} {what}" if num_layers > 0 else f" without the top {count} {what}"
    if "way" in rate:
        told += f" ({rate['way']})"
    return told


def _edges(tally: Tally) -> Iterator[str]:
    """Where a better rate may lie beyond those that were tried, of lists that are a row of rates."""
    at_edge = [
        str(cell)
        for cell, result in tally.results.items()
        if len(rates := rates_of(tally.summary, cell)) > 2
        and not any({"epochs", "num_layers", "way"} & set(rate) for rate in rates)
        and result.rate in (0, len(rates) - 1)
    ]
    if at_edge:
        yield (
            f"In {len(at_edge)} of {len(tally.results)} cells the first or the last rate of the list "
            f"won, so that rates beyond it may be better: {', '.join(at_edge)}."
        )


def _cost(tally: Tally, records: list[Record]) -> str:
    backbones = _different(r["parameters"]["backbone"] for r in records)
    heads = [record["parameters"]["head"] for record in records]
    names = " and ".join(dict.fromkeys(r["recipe"]["backbone"]["name"] for r in records))
    return (
        f"Adapter parameters are counted without the head ({min(heads):,} to {max(heads):,}), the share "
        f"is of the {backbones} of {names}. Parameters, kB on disk and seconds of one training are "
        "means over data sets and seeds; CPU seconds include reading and loading."
    )


def _missing(tally: Tally) -> Iterator[str]:
    wanted = len(tally.seeds)
    missing = [str(c) for c, r in tally.results.items() if len(r.runs) < wanted and not r.failed]
    if missing:
        yield f"Not (wholly) run: {', '.join(missing)}."


def _failures(tally: Tally) -> Iterator[str]:
    failed = [record for result in tally.results.values() for record in result.failed]
    if failed:
        shown = [
            f"{r['data']}{'' if r['size'] is None else '-' + str(r['size'])}/{r['method']} "
            f"{_rate(r['rate'])} seed {r['seed']}: {r['error']}"
            for r in failed[:_SHOWN]
        ]
        more = f" And {len(failed) - _SHOWN} more." if len(failed) > _SHOWN else ""
        yield f"Failed runs: {len(failed)}. {' '.join(shown)}{more}"


def _machine(records: list[Record]) -> str:
    machines = dict.fromkeys(
        f"{m['gpu'] or str(m['cores']) + ' CPU cores' + _of(m.get('cpu'))}, {m['threads']} "
        f"thread{'s' * (m['threads'] != 1)}"
        for m in (record["machine"] for record in records)
    )
    versions = dict.fromkeys(
        ", ".join(f"{name} {r['versions'][name]}" for name in ("torch", "transformers", "peft"))
        for r in records
    )
    precisions = " or ".join(dict.fromkeys(r["recipe"]["fit"]["precision"] for r in records))
    return (
        f"{len(records)} tested runs; {' or '.join(machines)}; {' or '.join(versions)}; precision "
        f"{precisions}."
    )


def _of(cpu: str | None) -> str:
    return "" if cpu is None else f" of {cpu}"


def _listed(values: list[int]) -> str:
    return ", ".join(str(value) for value in values)

"""The figures that the project is measured by, computed from the result files of its grids."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from pastina.bench.grid import Cell
from pastina.bench.tally import CellResult, Tally, read_tally
from pastina.files import whole_file
from pastina.kinds import LOWER_IS_BETTER

_EXACT = 20  # pairs, up to which all 2^n signs are tried
_DRAWS = 1_000_000
_SMALL = 0.1  # of LoRA's numbers
_APART = 2.0  # points between floor and ceiling, from which on a share of the gap means something


@dataclass(frozen=True, slots=True)
class Labels:
    """What the methods are called in the grids. small: the best preset with at most a tenth of LoRA's
    numbers, compared with it; where it did not run, `best` is. ordinary: controls for special, each
    compared apart."""

    floor: str = "linear"
    ceiling: str = "full"
    plain: str = "pasta"
    best: str = "pasta-best"
    small: str = "pasta-wide"
    lora: str = "lora"
    special: str = "pasta"
    ordinary: tuple[str, ...] = ("first-positions", "random-positions")


def bench_evidence(
    folders: Sequence[str | Path], labels: Labels, json_file: str | Path | None = None
) -> dict[str, Any]:
    """The figures of these result folders; None where the runs for one are not (all) there.

    gap_closed_*: (method - floor) / (ceiling - floor) on test, mean over data sets. best_vs_lora: mean
    difference in points. special_vs_ordinary: mean difference in points over seeds and data sets, and a
    two-sided paired test of it. "how" says in words what each was computed from.

    Raises:
        PastinaError: a folder holds no results.
    """
    tallies = {tally.summary["name"]: tally for tally in map(read_tally, folders)}
    figures: dict[str, Any] = {}
    how: dict[str, str] = {}
    for part in (_gaps, _best_against_lora, _special_against_ordinary):
        found, words = part(tallies, labels)
        figures |= found
        how |= words
    figures = {key: _rounded(value) for key, value in figures.items()} | {"how": how}
    if json_file is not None:
        with whole_file(Path(json_file)) as file:
            json.dump(figures, file, indent=1, ensure_ascii=False)
            file.write("\n")
    return figures


Part = tuple[dict[str, Any], dict[str, str]]


def _gaps(tallies: Mapping[str, Tally], labels: Labels) -> Part:
    figures: dict[str, Any] = {}
    how: dict[str, str] = {}
    compared = {"pasta": labels.plain, "best": labels.best}
    compared |= {"small": labels.small, "lora": labels.lora}
    for key, label in ((f"gap_closed_{name}", label) for name, label in compared.items()):
        wanted = (labels.floor, label, labels.ceiling)
        name, scores = _complete(tallies, wanted)
        shares = _shares(scores)
        apart = [s for d, s in shares.items() if scores[d][2] - scores[d][0] >= _APART]
        figures[key] = statistics.fmean(shares.values()) if shares else None
        figures[f"{key}_where_apart"] = statistics.fmean(apart) if apart else None
        figures[f"{key}_pooled"] = _pooled(scores)
        by_seed = [_complete(tallies, wanted, seed)[1] for seed in _seeds(tallies, name)]
        of_seeds = [statistics.fmean(own.values()) for s in by_seed if (own := _shares(s))]
        if len(of_seeds) > 1:
            figures[f"{key}_by_seed"] = statistics.fmean(of_seeds)
            figures[f"{key}_sd"] = statistics.stdev(of_seeds)
        how[key] = _gap_words(name, wanted, scores, shares, len(apart))
    return figures, how


def _shares(scores: Mapping[str, tuple[float, ...]]) -> dict[str, float]:
    """By data set, where there is a gap."""
    return {
        data: (seen - floor) / (ceiling - floor)
        for data, (floor, seen, ceiling) in scores.items()
        if ceiling > floor
    }


def _seeds(tallies: Mapping[str, Tally], name: str) -> Sequence[int]:
    return tallies[name].seeds if name in tallies else ()


def _pooled(scores: Mapping[str, tuple[float, ...]]) -> float | None:
    """The share of the mean gap, in which a small gap counts little."""
    if not scores:
        return None
    floor, seen, ceiling = (
        statistics.fmean(column) for column in zip(*scores.values(), strict=True)
    )
    return (seen - floor) / (ceiling - floor) if ceiling > floor else None


def _gap_words(
    name: str,
    wanted: Sequence[str],
    scores: Mapping[str, tuple[float, ...]],
    shares: Mapping[str, float],
    num_apart: int,
) -> str:
    if not scores:
        return f"Not all of {', '.join(wanted)} ran on a data set in common."
    left_out = sorted(set(scores) - set(shares))
    without = f" Left out, as {wanted[2]} is not above: {', '.join(left_out)}." if left_out else ""
    listed = ", ".join(f"{data} {share:.2f}" for data, share in shares.items())
    return (
        f"Grid {name}: share of the gap from {wanted[0]} to {wanted[2]} that {wanted[1]} closes on "
        f"test, mean of {len(shares)} data sets ({listed}).{without} where_apart: the {num_apart} of "
        f"them with a gap of {_APART:g} points or more. pooled: share of the mean gap. by_seed, sd: "
        "mean and standard deviation of the mean share of each seed, over the sets where it has a gap."
    )


def _best_against_lora(tallies: Mapping[str, Tally], labels: Labels) -> Part:
    ours = labels.small
    name, scores = _complete(tallies, (ours, labels.lora))
    if not scores:
        ours = labels.best
        name, scores = _complete(tallies, (ours, labels.lora))
    differences = {data: best - lora for data, (best, lora) in scores.items()}
    if not differences:
        return (
            {"best_vs_lora": None, "best_vs_lora_parameters": None},
            {"best_vs_lora": f"Not both of {ours}, {labels.lora} ran on a data set in common."},
        )
    counts = [_adapter_parameters(tallies[name], m, list(scores)) for m in (ours, labels.lora)]
    ratios = {
        data: _adapter_parameters(tallies[name], ours, [data])
        / _adapter_parameters(tallies[name], labels.lora, [data])
        for data in scores
    }
    within = [differences[data] for data, ratio in ratios.items() if ratio <= _SMALL]
    largest = max(ratios, key=lambda data: ratios[data])
    listed = ", ".join(f"{data} {difference:+.2f}" for data, difference in differences.items())
    return (
        {
            "best_vs_lora": statistics.fmean(differences.values()),
            "best_vs_lora_parameters": counts[0] / counts[1],
            "best_vs_lora_parameters_largest": ratios[largest],
            "best_vs_lora_where_small": statistics.fmean(within) if within else None,
        },
        {
            "best_vs_lora": f"Grid {name}: {ours} ({counts[0]:,.0f} adapter parameters) against "
            f"{labels.lora} ({counts[1]:,.0f}), mean difference in points on test over "
            f"{len(differences)} data sets ({listed}). best_vs_lora_parameters: one count by the other; "
            f"largest: of one data set, {largest}. "
            f"where_small: over the {len(within)} data sets with at most a tenth."
        },
    )


def _adapter_parameters(tally: Tally, method: str, sets: Sequence[str]) -> float:
    counts = (tally.results[Cell(d, method, None)].mean_of("parameters", "adapter") for d in sets)
    return statistics.fmean(count for count in counts if count is not None)


def _special_against_ordinary(tallies: Mapping[str, Tally], labels: Labels) -> Part:
    """The key without a name is the comparison with the control that does better, the harder one."""
    figures: dict[str, Any] = {"special_vs_ordinary": None, "special_vs_ordinary_p": None}
    how: dict[str, str] = {}
    hardest = None
    for control in labels.ordinary:
        name, pairs = _pairs(tallies, labels.special, control)
        differences = [special - ordinary for special, ordinary in pairs.values()]
        if not differences:
            continue
        mean, p = statistics.fmean(differences), sign_flip_p(differences)
        key = f"special_vs_{control.replace('-', '_')}"
        figures |= {key: mean, f"{key}_p": p}
        sets, seeds = ({pair[i] for pair in pairs} for i in (0, 1))
        how[key] = (
            f"Grid {name}: {labels.special} against {control}, mean difference in points on test over "
            f"{len(pairs)} pairs of the same seed and data set ({len(seeds)} seeds, {len(sets)} data "
            f"sets). p: two-sided sign-flip test of the mean of the paired differences, "
            + ("all signs." if len(pairs) <= _EXACT else f"{_DRAWS:,} draws with a fixed seed.")
        )
        if hardest is None or mean < hardest[0]:
            hardest = (mean, p, control)
    if hardest is None:
        controls = ", ".join(labels.ordinary)
        how["special_vs_ordinary"] = f"{labels.special} and one of {controls} did not run together."
    else:
        figures |= {"special_vs_ordinary": hardest[0], "special_vs_ordinary_p": hardest[1]}
        how["special_vs_ordinary"] = f"Against {hardest[2]}, the control that did better."
    return figures, how


def sign_flip_p(differences: Sequence[float]) -> float:
    """Two-sided p of the hypothesis that each difference could as well have the other sign.

    The share of sign patterns whose mean is at least as far from 0 as the one that was seen (Fisher,
    The Design of Experiments, section 21).

    >>> sign_flip_p([1.0, 1.0, 1.0, 1.0])
    0.125
    """
    values = np.asarray(differences, dtype=float)
    seen = abs(values.sum()) - 1e-9
    if len(values) <= _EXACT:
        sums = np.zeros(1)
        for value in values:
            sums = np.concatenate([sums + value, sums - value])
        return float(np.mean(np.abs(sums) >= seen))
    draw = np.random.default_rng(0)
    hits, block = 0, 50_000
    for _ in range(_DRAWS // block):
        signs = draw.integers(0, 2, size=(block, len(values)), dtype=np.int8) * 2 - 1
        hits += int(np.count_nonzero(np.abs(signs @ values) >= seen))
    return (hits + 1) / (_DRAWS + 1)  # the pattern that was seen is one of them


def _complete(
    tallies: Mapping[str, Tally], methods: Sequence[str], seed: int | None = None
) -> tuple[str, dict[str, tuple[float, ...]]]:
    """The grid with the most data sets on which all these methods ran with all seeds; their means, or
    the scores with this seed."""
    best: tuple[str, dict[str, tuple[float, ...]]] = ("", {})
    for name, tally in tallies.items():
        scores = {}
        for data in tally.sets(None):
            seen = [tally.results.get(Cell(data, method, None)) for method in methods]
            own = [cell.scores() for cell in seen if _counts(cell)]
            if len(own) == len(methods) and all(set(s) == set(tally.seeds) for s in own):
                kept = own if seed is None else [{seed: s[seed]} for s in own]
                scores[data] = tuple(statistics.fmean(s.values()) for s in kept)
        if len(scores) > len(best[1]):
            best = (name, scores)
    return best


def _counts(cell: CellResult | None) -> TypeGuard[CellResult]:
    """Whether a cell has points on test."""
    return cell is not None and cell.metric not in LOWER_IS_BETTER and not cell.is_on_dev


def _pairs(
    tallies: Mapping[str, Tally], one: str, other: str
) -> tuple[str, dict[tuple[str, int], tuple[float, float]]]:
    """Scores of two methods by data set and seed, of the grid that has most of them."""
    best: tuple[str, dict[tuple[str, int], tuple[float, float]]] = ("", {})
    for name, tally in tallies.items():
        pairs = {}
        for data in tally.sets(None):
            cells = [tally.results.get(Cell(data, method, None)) for method in (one, other)]
            if not all(map(_counts, cells)):
                continue
            first, second = (cell.scores() for cell in cells if cell is not None)
            pairs |= {(data, s): (first[s], second[s]) for s in first if s in second}
        if len(pairs) > len(best[1]):
            best = (name, pairs)
    return best


def _rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value

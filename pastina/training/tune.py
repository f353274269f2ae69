"""Search of a recipe's settings on its dev part, all trials as one fleet. Test is never looked at."""

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from pastina.errors import PastinaError, RecipeError
from pastina.files import no_empty_folders, whole_file
from pastina.kinds import LOWER_IS_BETTER
from pastina.recipe import Recipe, recipe_toml, with_values
from pastina.training.events import OnEvent, ignore
from pastina.training.fit import Run, resume_recipe
from pastina.training.fleet import MAX_TOKENS, train_fleet

# as multiples of the method's own rate
_RATES = (0.3, 1.0, 3.0)
_SEED = "fit.seed"
_NOT_COMPARED = {"kind", "fit.metric", "data.folder", "data.hub", "data.config", "data.label"} | {
    f"data.dev{end}" for end in ("", "_rows", "_share")
}
_SOURCE = "the grid"
_SEARCH = "search.json"  # what is searched, written before the first trial


@dataclass(frozen=True, slots=True)
class Trial:
    """One setting. scores: the dev metric by seed; score: their mean; None: a seed failed.

    epoch: the best one of the first seed. error: why it failed.
    """

    settings: dict[str, Any]
    scores: dict[int, float]
    score: float | None
    epoch: int | None
    seconds: float
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Tuned:
    """What a search found: the winner's recipe, its score on dev, and all trials, the best first."""

    recipe: Recipe
    metric: str
    score: float
    trials: tuple[Trial, ...]

    @property
    def failed(self) -> list[Trial]:
        """Those of which a seed failed."""
        return [trial for trial in self.trials if trial.score is None]


def tune(
    recipe: Recipe,
    out: str | Path,
    *,
    grid: Mapping[str, Sequence[Any]] | None = None,
    seeds: Sequence[int] | None = None,
    resume: bool = False,
    on_event: OnEvent = ignore,
    max_tokens: int = MAX_TOKENS,
) -> Tuned:
    """Train every setting of the grid with every seed as one fleet and pick the best on dev.

    `out` then holds the winner's recipe.toml, trials.json, trials.md, search.json and a run's folder for
    each trial. A trial that fails comes last, with its error; the others go on.

    Args:
        grid: values to try by key of the recipe ("fit.lr"); None: three rates of vectors and of head
            around the method's own.
        seeds: of each setting; None: the recipe's own.
        resume: go on with a search that was stopped, of the same recipe, grid and seeds.

    Raises:
        RecipeError: a key or value that the recipe does not take; the folder is taken, or holds another
            search.
        PastinaError: every trial failed; where none could begin, `out` is left as it was.
        Stopped: Ctrl-C.
    """
    folder = Path(out)
    grid = dict(grid) if grid is not None else _default_grid(recipe)
    if _SEED in grid:
        raise RecipeError("fit.seed is no setting to choose by luck: use seeds instead.")
    drawn = {"data.train"} if recipe.data.dev is None else set()  # then dev is a part of it
    if unlike := sorted(grid.keys() & (_NOT_COMPARED | drawn)):
        raise RecipeError(
            f"{unlike[0]} decides what is measured, so trials with different values cannot be compared. "
            "Set it in the recipe, and search once for each value."
        )
    seeds = tuple(seeds or (recipe.fit.seed,))
    settings = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
    members = [(one, seed) for one in settings for seed in seeds]
    recipes = [with_values(recipe, {**one, _SEED: seed}, _SOURCE) for one, seed in members]
    outs = [folder / "trials" / f"{i:03d}" for i in range(len(members))]
    search = {"settings": grid, "seeds": seeds}
    if resume:
        _check_same(folder, search, recipes, outs)
    else:
        _check_free(folder)
    with _put_down(folder, search, resume):
        found = train_fleet(recipes, outs, resume=resume, on_event=on_event, max_tokens=max_tokens)
    runs = {(_key(one), seed): run for (one, seed), run in zip(members, found, strict=True)}
    trials = [_trial(one, {seed: runs[_key(one), seed] for seed in seeds}) for one in settings]
    return _write(folder, recipe, found, trials)


def _check_free(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RecipeError(
            f"{folder} exists and is not empty. Name another folder, or resume the search in it."
        )


def _check_same(
    folder: Path, search: Mapping[str, Any], recipes: Sequence[Recipe], outs: Sequence[Path]
) -> None:
    """Nothing, if this search was begun in the folder: no result of another one may be lost."""
    path = folder / _SEARCH
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
        pairs = {part: (json.dumps(old[part]), json.dumps(now)) for part, now in search.items()}
    except (FileNotFoundError, NotADirectoryError):
        raise RecipeError(
            f"There is nothing to resume in {folder}: it holds no {_SEARCH}."
        ) from None
    except (ValueError, TypeError, KeyError) as error:
        raise RecipeError(
            f"{path} does not describe a search ({error}). Search in another folder."
        ) from None
    for part, (before, now) in pairs.items():  # the order of keys counts: it numbers the trials
        if before != now:
            raise RecipeError(
                f"The search in {folder} was begun with other {part}: {before}, not {now}. Resume it "
                "with its own, or search in another folder."
            )
    for recipe, out in zip(recipes, outs, strict=True):
        if (out / "recipe.toml").is_file() and resume_recipe(out) != recipe.resolved():
            raise RecipeError(
                f"The search in {folder} was begun with another recipe: {out / 'recipe.toml'} would be "
                "a different one now. Resume it with its own, or search in another folder."
            )


@contextmanager
def _put_down(folder: Path, search: Mapping[str, Any], resume: bool) -> Iterator[None]:
    """Say in the folder what is searched; nothing stays if no trial could begin."""
    with no_empty_folders(folder):
        if not resume:
            with whole_file(folder / _SEARCH) as file:
                json.dump(search, file, indent=1)
        try:
            yield
        finally:
            if not (folder / "trials").is_dir():
                (folder / _SEARCH).unlink(missing_ok=True)


def _default_grid(recipe: Recipe) -> dict[str, Sequence[Any]]:
    fit = recipe.resolved().fit
    assert fit.lr is not None
    assert fit.head_lr is not None
    rates = [float(f"{fit.head_lr * times:.2g}") for times in _RATES]
    if recipe.method.name == "linear":
        return {"fit.head_lr": rates}
    return {"fit.lr": [float(f"{fit.lr * times:.2g}") for times in _RATES], "fit.head_lr": rates}


def _key(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)


def _trial(settings: dict[str, Any], runs: Mapping[int, Run | PastinaError]) -> Trial:
    errors = [str(run) for run in runs.values() if isinstance(run, PastinaError)]
    done = {seed: run for seed, run in runs.items() if isinstance(run, Run)}
    scores = {seed: run.metrics[run.metric] for seed, run in done.items()}
    first = next(iter(done.values()), None)
    return Trial(
        settings=settings,
        scores=scores,
        score=None if errors else statistics.fmean(scores.values()),
        epoch=None if first is None else first.best_epoch,
        seconds=round(sum(run.seconds for run in done.values()), 2),
        error=errors[0] if errors else None,
    )


def _write(
    folder: Path, recipe: Recipe, found: Sequence[Run | PastinaError], trials: Sequence[Trial]
) -> Tuned:
    done = [trial for trial in trials if trial.score is not None]
    if not done:
        raise PastinaError(f"Every trial failed; the first: {trials[0].error}")
    metric = next(run.metric for run in found if isinstance(run, Run))
    sign = -1 if metric in LOWER_IS_BETTER else 1
    ordered = sorted(trials, key=lambda trial: _rank(trial, sign))
    best = ordered[0]
    assert best.score is not None
    winner = with_values(recipe, best.settings, _SOURCE)
    tuned = Tuned(winner, metric, best.score, tuple(ordered))
    with whole_file(folder / "trials.json") as file:
        json.dump([asdict(trial) for trial in ordered], file, indent=1)
    with whole_file(folder / "trials.md") as file:
        file.write(table(tuned))
    with whole_file(folder / "recipe.toml") as file:
        file.write(recipe_toml(winner))
    return tuned


def _rank(trial: Trial, sign: int) -> float:
    return math.inf if trial.score is None else -sign * trial.score


def table(tuned: Tuned) -> str:
    """All trials as a Markdown table, the best first."""
    keys = list(tuned.trials[0].settings)
    lines = [
        "| "
        + " | ".join([*keys, f"{tuned.metric} on dev", "seeds", "best epoch", "seconds"])
        + " |",
        "|" + "---|" * (len(keys) + 4),
    ]
    for trial in tuned.trials:
        score = "failed" if trial.score is None else f"{trial.score:.4f}"
        if len(trial.scores) > 1 and trial.score is not None:
            score += f" ± {statistics.stdev(trial.scores.values()):.4f}"
        cells = [*(f"{trial.settings[key]}" for key in keys), score, str(len(trial.scores))]
        lines.append(
            "| " + " | ".join([*cells, str(trial.epoch or ""), f"{trial.seconds:.0f}"]) + " |"
        )
    return "\n".join(lines) + "\n"

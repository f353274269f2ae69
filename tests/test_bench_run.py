"""Grids: what they expand to, how they are worked off, and what may go wrong with them."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pastina
from pastina.bench.grid import Cell, Grid, read_grid
from pastina.bench.notes import notes
from pastina.bench.results import (
    rates_of,
    read_of,
    read_record,
    read_summary,
    result_path,
    write_summary,
)
from pastina.bench.run import WORK, JobEnd, _Work, alone, listing, run_grid, steps
from pastina.bench.tally import read_tally
from pastina.errors import PastinaError, RecipeError
from pastina.recipe import make_recipe, recipe_toml
from pastina.training.events import EpochEnd
from tests import processes
from tests.backbone_folder import toy_rows, write_rows

ROOT = Path(__file__).parents[1]
MakeGrid = Callable[..., Path]
RATES = "rates = [{ lr = 1e-9, head_lr = 1e-9 }, { lr = 3e-2, head_lr = 3e-2 }]\n"  # of pasta
PLAIN = """
name = "toy"
recipes = ["topics.toml"]
seeds = [1, 2]
base.fit = { precision = "fp32", epochs = 2, batch = 8 }
[methods.pasta]
method = "pasta"
rates = [{ lr = 1e-9, head_lr = 1e-9 }, { lr = 3e-2, head_lr = 3e-2 }]
[methods.linear]
method = { name = "linear" }
rates = [1e-9, 3e-2]
"""


@pytest.fixture
def toy_grid(toy: Callable[..., Any], tmp_path: Path) -> MakeGrid:
    """Writes a grid on two toy data sets, topics and scores; test differs from dev."""

    def make(text: str = PLAIN) -> Path:
        for name, kind in (("topics", "classify"), ("scores", "regress")):
            test = write_rows(tmp_path / f"{kind}-test.jsonl", toy_rows(kind, 30, seed=2))
            recipe = toy(kind, rows=120, data={"test": str(test)})
            (tmp_path / f"{name}.toml").write_text(recipe_toml(recipe), encoding="utf-8")
        path = tmp_path / "grid.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return make


def run(grid: Grid, out: Path, **options: Any) -> Any:
    return run_grid(grid, out, **options)


def records(out: Path) -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in sorted(out.glob("*/*.json"))}


# ---------------------------------------------------------------------------------------------------
# Expansion


def test_a_grid_is_a_list_of_independent_jobs(toy_grid: MakeGrid) -> None:
    grid = read_grid(toy_grid())
    assert grid.cells == [Cell("topics", "pasta"), Cell("topics", "linear")]
    jobs = [job for cell in grid.cells for job in (*grid.search(cell), *grid.final(cell, 1))]
    assert len({job.id for job in jobs}) == 2 * 3  # the winner's first seed is a search run
    first, second = grid.search(grid.cells[0])
    assert first.recipe.fit.lr == 1e-9
    assert second.recipe.fit.lr == 3e-2
    linear = grid.search(grid.cells[1])[0].recipe
    assert (linear.fit.head_lr, linear.fit.lr) == (1e-9, linear.resolved().fit.lr)
    assert [job.seed for job in grid.final(grid.cells[0], 0)] == [1, 2]
    assert second.name == "topics/pasta-lr0.03-headlr0.03-seed1"


def test_epochs_can_be_chosen_with_a_rate(toy_grid: MakeGrid) -> None:
    rates = "rates = [{ lr = 3e-2, epochs = 3 }, { lr = 3e-2, epochs = 5 }]\n"
    few, many = read_grid(toy_grid(PLAIN.replace(RATES, rates))).search(Cell("topics", "pasta"))
    assert (few.recipe.fit.epochs, many.recipe.fit.epochs) == (3, 5)
    assert many.name == "topics/pasta-lr0.03-epochs5-seed1"
    with pytest.raises(RecipeError, match=r"epochs.*integer"):
        read_grid(toy_grid(PLAIN.replace(RATES, rates.replace("= 5", "= 5.5"))))


def test_fewer_layers_can_be_chosen_with_a_rate(toy_grid: MakeGrid) -> None:
    rates = "rates = [{ lr = 3e-2 }, { lr = 3e-2, num_layers = -1 }]\n"
    grid = read_grid(toy_grid(PLAIN.replace(RATES, rates)))
    whole, fewer = grid.search(Cell("topics", "pasta"))
    assert (whole.recipe.backbone.num_layers, fewer.recipe.backbone.num_layers) == (None, -1)
    assert whole.recipe.backbone.name == fewer.recipe.backbone.name
    assert whole.recipe.fit == fewer.recipe.fit
    assert fewer.name == "topics/pasta-lr0.03-numlayers-1-seed1"
    assert whole.id != fewer.id


def test_ways_that_a_rate_names(toy_grid: MakeGrid) -> None:
    """A choice may change other settings as well, and be the very run of another method."""
    text = PLAIN.replace(RATES, 'rates = [{ lr = 3e-2 }, { lr = 3e-2, way = "tied" }]\n')
    own = "ways.tied = { method = { share = 'all' }, fit = { warmup = 0.5 } }\n"
    text = text.replace("[methods.linear]\n", own + "[methods.linear]\n")
    grid = read_grid(toy_grid(text))
    cell = Cell("topics", "pasta")
    plain, tied = grid.search(cell)
    assert (plain.recipe.method.share, tied.recipe.method.share) == ("none", "all")  # type: ignore[union-attr]
    assert tied.recipe.fit.warmup == 0.5
    assert tied.name == "topics/pasta-lr0.03-waytied-seed1"
    assert rates_of(grid.summary(), cell)[1] == {"lr": 3e-2, "way": "tied"}
    with pytest.raises(RecipeError, match="the way 'tied' is not one of its ways"):
        read_grid(toy_grid(text.replace(own, "")))
    with pytest.raises(RecipeError, match="the way 'other' is chosen by none"):
        read_grid(toy_grid(text.replace(own, own + "ways.other = { fit = { warmup = 0.1 } }\n")))
    with pytest.raises(RecipeError, match="becomes part of a file's name"):
        read_grid(toy_grid(text.replace("tied", "t/d").replace("ways.t/d", 'ways."t/d"')))


def test_settings_for_the_sets_of_a_kind(toy_grid: MakeGrid) -> None:
    own = "kinds.regress = { method = { share = 'all' }, fit = { epochs = 9 } }\n[methods.linear]\n"
    text = PLAIN.replace("[methods.linear]\n", "set.fit.epochs = 7\n" + own)
    grid = read_grid(toy_grid(text.replace('["topics.toml"]', '["topics", "scores"]')))
    topics, scores = (grid.search(Cell(d, "pasta"))[0].recipe for d in ("topics", "scores"))
    assert (topics.method.share, topics.fit.epochs) == ("none", 7)  # type: ignore[union-attr]
    assert (scores.method.share, scores.fit.epochs) == ("all", 9)  # type: ignore[union-attr]
    assert grid.search(Cell("scores", "linear"))[0].recipe.fit.epochs == 2
    both = text.replace('["topics.toml"]', '["topics", "scores"]')
    with pytest.raises(RecipeError, match=r"settings for the kind 'tag'.*: classify, regress\."):
        read_grid(toy_grid(both.replace("kinds.regress", "kinds.tag")))
    with pytest.raises(RecipeError, match=r"kinds.*'classify'"):
        read_grid(toy_grid(text.replace("kinds.regress", "kinds.number")))


def test_rates_for_the_sets_of_a_kind(toy_grid: MakeGrid) -> None:
    own = "kind_rates.regress = [{ lr = 3e-2, epochs = 9 }, { lr = 3e-2, epochs = 8 }]\n"
    text = PLAIN.replace("[methods.linear]\n", own + "[methods.linear]\n")
    text = text.replace('["topics.toml"]', '["topics", "scores"]')
    grid = read_grid(toy_grid(text))
    topics, scores = Cell("topics", "pasta"), Cell("scores", "pasta")
    assert [job.recipe.fit.lr for job in grid.search(topics)] == [1e-9, 3e-2]
    assert [job.recipe.fit.epochs for job in grid.search(scores)] == [9, 8]
    assert [job.recipe.fit.epochs for job in grid.final(scores, 1)] == [8, 8]
    assert grid.search(scores)[0].name == "scores/pasta-lr0.03-epochs9-seed1"
    summary = grid.summary()
    assert [rate["epochs"] for rate in rates_of(summary, scores)] == [9, 8]
    assert [rate["lr"] for rate in rates_of(summary, topics)] == [1e-9, 3e-2]
    assert "kind_rates" not in read_grid(toy_grid(PLAIN)).summary()
    with pytest.raises(RecipeError, match=r"different numbers of rates .*pasta for regress 3"):
        read_grid(toy_grid(text.replace("epochs = 8 }", "epochs = 8 }, 1e-3")))
    with pytest.raises(RecipeError, match=r"kind_rates.*at least 1"):
        read_grid(toy_grid(text.replace(own, "kind_rates.regress = []\n")))


def test_an_id_follows_content_and_not_place(toy_grid: MakeGrid, tmp_path: Path) -> None:
    path = toy_grid()

    def ids(text: str) -> list[str]:
        path.write_text(text, encoding="utf-8")
        return [job.id for job in read_grid(path).search(Cell("topics", "pasta"))]

    before = ids(PLAIN)
    assert ids(PLAIN + "set.fit.save_seconds = 3\n") == before
    assert ids(PLAIN.replace('"toy"', '"other"')) == before
    assert ids(PLAIN.replace("epochs = 2", "epochs = 3")) != before
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("classify-train", "classify-dev", "classify-test"):
        (elsewhere / f"{name}.jsonl").write_bytes((tmp_path / f"{name}.jsonl").read_bytes())
    recipe = (tmp_path / "topics.toml").read_text()
    (tmp_path / "topics.toml").write_text(recipe.replace(f"{tmp_path}/c", f"{elsewhere}/c"))
    assert str(elsewhere) in (tmp_path / "topics.toml").read_text()
    assert ids(PLAIN) == before
    with (elsewhere / "classify-dev.jsonl").open("a") as file:
        file.write('{"text": "one more fig", "label": "fruit"}\n')
    assert ids(PLAIN) != before


def test_later_sections_win(toy_grid: MakeGrid) -> None:
    path = toy_grid(
        PLAIN.replace('["topics.toml"]', '["topics", "scores"]')
        + "set.fit = { epochs = 7, batch = 4 }\n[sets.topics.set.fit]\nbatch = 2\nclip = 0.5\n"
    )
    grid = read_grid(path)
    fit = grid.search(Cell("topics", "linear"))[0].recipe.fit
    assert (fit.epochs, fit.batch, fit.clip) == (7, 4, 0.5)
    fit = grid.search(Cell("scores", "pasta"))[0].recipe.fit
    assert (fit.epochs, fit.batch, fit.clip) == (2, 8, 1.0)


def test_low_data_draws_dev_from_train(toy_grid: MakeGrid) -> None:
    sizes = PLAIN.replace("seeds", "sizes = [20, 30]\nseeds") + "[sets.topics]\nsizes = [25]\n"
    grid = read_grid(toy_grid(sizes.replace('["topics.toml"]', '["topics", "scores"]')))
    assert [str(cell) for cell in grid.cells] == [
        *("topics-25/pasta", "topics-25/linear"),
        *(f"scores-{size}/{method}" for size in (20, 30) for method in ("pasta", "linear")),
    ]
    data = grid.search(grid.cells[0])[0].recipe.data
    assert (data.limit, data.dev, data.dev_rows) == (25, None, 1000)


def test_only_takes_names_in_any_order(toy_grid: MakeGrid) -> None:
    grid = read_grid(toy_grid(PLAIN.replace('["topics.toml"]', '["topics", "scores"]')))
    assert len(grid.choose(["topics"])) == len(grid.choose(["pasta"])) == 2
    assert grid.choose(["pasta/scores"]) == grid.choose(["scores/pasta"])
    with pytest.raises(RecipeError, match=r"lora.*It has: topics, scores, pasta, linear"):
        grid.choose(["pasta", "lora"])


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (RATES, "rates = [1e-9]\n", r"pasta 1, linear 2.*not a fair choice"),
        ('method = "pasta"', 'method = "pastina"', r"toy.*topics/pasta.*unknown method 'pastina'"),
        ("epochs = 2", "epoch = 2", "unknown key 'fit.epoch'"),
        ("seeds = [1, 2]", "seeds = [1, 1]", "a seed twice"),
        ("seeds = [1, 2]", "seeds = []", "seeds"),
        ("seeds", "seads", "seads"),
        (RATES, "rates = [0.0, 3e-2]\n", "rates"),
        (RATES, "rates = [3e-2, 3e-2]\n", r"both have a run called 'topics/pasta-lr0.03-seed1'"),
        (RATES, "rates = [3e-2, 0.03000000001]\n", "both have a run called"),
        (RATES, "rates = [{ rate = 1.0 }, 3e-2]\n", "rates"),
        ('name = "toy"', 'name = "../toy"', "becomes the name of a file"),
        ("topics.toml", "nowhere.toml", r"no .*nowhere\.toml"),
        ('["topics.toml"]', '["topics", "topics.toml"]', "two recipes are called 'topics'"),
        ("[methods.pasta]", "[sets.other]\n[methods.pasta]", "sets.other is not among the recipes"),
        ("name", "name name", "not a TOML file"),
    ],
)
def test_refusals(old: str, new: str, words: str, toy_grid: MakeGrid) -> None:
    assert old in PLAIN
    with pytest.raises(RecipeError, match=words):
        read_grid(toy_grid(PLAIN.replace(old, new, 1)))


def test_a_free_budget_is_said(toy_grid: MakeGrid) -> None:
    text = PLAIN.replace(RATES, "rates = [1e-9]\n")
    grid = read_grid(toy_grid('budget = "free"\n' + text))
    assert grid.summary()["budget"] == "free"


# ---------------------------------------------------------------------------------------------------
# Running


def test_a_grid_runs_chooses_on_dev_and_is_not_run_twice(
    toy_grid: MakeGrid, tmp_path: Path
) -> None:
    grid, out = read_grid(toy_grid()), tmp_path / "results"
    end = run(grid, out)
    assert (end.done, end.failed) == (6, ())
    found = records(out)
    for method, key in (("pasta", "lr{0}-headlr{0}"), ("linear", "headlr{0}")):
        assert "test" not in found[f"{method}-{key.format(1e-9)}-seed1"], (
            "test is for the chosen rate only"
        )
        for seed in (1, 2):
            assert found[f"{method}-{key.format(0.03)}-seed{seed}"]["test"].keys() >= {"accuracy"}
        assert f"{method}-{key.format(1e-9)}-seed2" not in found
    record = found["pasta-lr0.03-headlr0.03-seed2"]
    epochs = record["epochs"]
    assert epochs["epoch"] == list(range(1, len(epochs["accuracy"]) + 1))
    best = epochs["accuracy"][record["best_epoch"] - 1]
    assert record["dev"]["accuracy"] == best == max(record["epochs"]["accuracy"])
    assert record["parameters"]["head"] == 32 * 2 + 2
    assert record["parameters"]["adapter"] == 2 * 2 * 32  # layers, slots, hidden
    assert record["rows"] == {"train": 120, "dev": 20, "test": 30}
    assert record["memory_mb"] > 100
    assert record["cpu_seconds"] > 0
    assert set(record["digests"]) == {"data", "backbone", "tokenizer", "adapter"}
    assert not any((out / WORK).iterdir()), "adapters are not kept"
    for path in out.glob("*/*.json"):
        assert path.stat().st_size < 6000
    again = pastina.train(make_recipe(record["recipe"]), tmp_path / "again")
    assert again.metrics == pytest.approx(record["dev"], abs=1e-6)
    assert pastina.evaluate(again.adapter) == pytest.approx(record["test"], abs=1e-6)
    assert again.trained_parameters == sum(record["parameters"][k] for k in ("adapter", "head"))
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/*.json")}
    assert run(grid, out).done == 6
    assert before == {path: path.stat().st_mtime_ns for path in out.glob("*/*.json")}


def test_the_same_run_in_two_cells_is_run_once(toy_grid: MakeGrid, tmp_path: Path) -> None:
    method = PLAIN[PLAIN.index("[methods.pasta]") : PLAIN.index("[methods.linear]")]
    again = method.replace("methods.pasta", "methods.again")
    grid, out = read_grid(toy_grid(PLAIN + again)), tmp_path / "out"
    begun: list[Any] = []
    done = run(grid, out, only=["pasta", "again"], on_event=begun.append)
    assert (done.done, done.failed) == (6, ())
    assert sum(isinstance(event, EpochEnd) for event in begun) == 2 * 3  # epochs of three runs
    found = records(out)
    for name, record in found.items():
        assert record["method"] == name.partition("-")[0]
        twin = found[name.replace("again", "pasta")]
        same = {key: value for key, value in record.items() if key != "method"}
        assert same == {key: value for key, value in twin.items() if key != "method"}


def test_a_failure_is_recorded_and_another_rate_wins(toy_grid: MakeGrid, tmp_path: Path) -> None:
    path = toy_grid(PLAIN.replace(RATES, "rates = [1e-2, 1e30]\nset.fit.clip = 0\n"))
    grid, out = read_grid(path), tmp_path / "results"
    end = run(grid, out, only=["pasta"])
    assert (end.done, len(end.failed)) == (2, 1)
    failed = records(out)["pasta-lr1e+30-seed1"]
    assert "became" in failed["error"]
    states = {row["run"]: row["state"] for row in listing(grid, out)}
    assert states["topics/pasta-lr1e+30-seed1"].startswith("failed: The ")
    assert states["topics/pasta-lr0.01-seed2"] == "done"
    assert states["topics/linear, seeds 2"] == "waits for the choice of a rate"
    begun = []
    run(grid, out, only=["pasta"], on_event=begun.append)
    assert not begun, "what failed is not tried again unless one asks"
    run(grid, out, only=["pasta"], retry=True, on_event=begun.append)
    assert begun


def test_a_data_file_that_is_not_there_is_a_failure(toy_grid: MakeGrid, tmp_path: Path) -> None:
    """The other data sets run all the same; and when it is there, it is run."""
    path = toy_grid(PLAIN.replace('["topics.toml"]', '["scores.toml", "topics.toml"]'))
    rows = next(tmp_path.glob("*regress*test*"))
    away = rows.rename(tmp_path / "away")
    grid, out = read_grid(path), tmp_path / "results"
    assert {row["state"] for row in listing(grid, out) if row["id"]} == {"to do"}
    end = run(grid, out, only=["linear"])
    assert (end.done, len(end.failed)) == (3, 2)
    assert all("does not exist" in record["error"] for record in end.failed)
    away.rename(rows)
    end = run(read_grid(path), out, only=["linear"])
    assert (end.done, end.failed) == (6, ())


def test_results_of_other_settings_are_not_counted(toy_grid: MakeGrid, tmp_path: Path) -> None:
    path, out = toy_grid(), tmp_path / "results"
    run(read_grid(path), out, only=["linear"])
    cell = Cell("topics", "linear")
    assert len(read_tally(out).results[cell].runs) == 2
    path.write_text(path.read_text().replace("epochs = 2", "epochs = 3"))
    write_summary(out, read_grid(path))
    tally = read_tally(out)
    assert not tally.results[cell].runs
    assert "Not counted: 3 results of other settings than the grid has now." in notes(tally)


def test_a_twin_of_a_rate_that_was_not_chosen_is_not_trained_again(
    toy_grid: MakeGrid, tmp_path: Path
) -> None:
    method = PLAIN[PLAIN.index("[methods.linear]") :]
    again = method.replace("methods.linear", "methods.again").replace(
        "[1e-9, 3e-2]", "[1e-9, 1e-10]"
    )
    grid = read_grid(toy_grid(PLAIN.replace("seeds = [1, 2]", "seeds = [1]") + again))
    begun: list[Any] = []
    done = run(grid, tmp_path / "out", only=["linear", "again"], on_event=begun.append)
    assert (done.done, done.failed) == (4, ())
    assert sum(isinstance(event, EpochEnd) for event in begun) == 2 * 3  # epochs of three runs
    assert not any((tmp_path / "out" / WORK).iterdir())


def test_all_rates_may_fail(toy_grid: MakeGrid, tmp_path: Path) -> None:
    path = toy_grid(PLAIN.replace(RATES, "rates = [1e29, 1e30]\nset.fit.clip = 0\n"))
    end = run(read_grid(path), tmp_path / "results", only=["pasta"])
    assert (end.done, len(end.failed)) == (0, 2)


def test_broken_and_old_results_are_made_again(toy_grid: MakeGrid, tmp_path: Path) -> None:
    grid, out = read_grid(toy_grid()), tmp_path / "results"
    run(grid, out, only=["linear"])
    job = grid.search(Cell("topics", "linear"))[0]
    path = result_path(out, job)
    good = path.read_text()
    for text in ("", "[]", '{"id": 3}', good[:-20], "[" * 100_000, '"\\ud800"'):
        path.write_text(text)
        assert read_of(out, job) is None
        with pytest.raises(PastinaError, match="is not a result of a run"):
            read_record(path)
    old = json.loads(good)
    old["recipe"]["fit"]["warmup"] = 0.5  # as if the default had been another then
    path.write_text(json.dumps(old))
    assert read_of(out, job) is None
    assert [step.job for step in steps(grid, job.cell, out)] == [job]
    run(grid, out, only=["linear"])
    assert read_of(out, job) is not None


def test_a_folder_belongs_to_one_grid(toy_grid: MakeGrid, tmp_path: Path) -> None:
    path, out = toy_grid(), tmp_path / "results"
    write_summary(out, read_grid(path))
    before = (out / "grid.json").read_bytes()
    path.write_text(PLAIN.replace('"toy"', '"other"'), encoding="utf-8")
    with pytest.raises(PastinaError, match="results of the grid 'toy', not of 'other'"):
        run(read_grid(path), out)
    with pytest.raises(PastinaError, match="results of the grid 'toy', not of 'other'"):
        listing(read_grid(path), out)
    assert listing(read_grid(path), tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    assert [path.name for path in out.iterdir()] == ["grid.json"]
    assert (out / "grid.json").read_bytes() == before
    path.write_text(PLAIN.replace("seeds = [1, 2]", "seeds = [1, 2, 3]"), encoding="utf-8")
    write_summary(out, read_grid(path))
    assert read_summary(out)["seeds"] == [1, 2, 3], "a grid may grow"


def test_without_test_labels_dev_is_all_there_is(toy_grid: MakeGrid, tmp_path: Path) -> None:
    path = toy_grid()
    recipe = (tmp_path / "topics.toml").read_text()
    lines = [line for line in recipe.splitlines() if not line.startswith("test")]
    (tmp_path / "topics.toml").write_text("\n".join(lines))
    end = run(read_grid(path), tmp_path / "results", only=["linear"], keep=True)
    assert (end.done, end.failed) == (3, ())
    record = records(tmp_path / "results")["linear-headlr0.03-seed2"]
    assert record["test"] == {}
    kept = tmp_path / "results" / WORK / record["id"] / "adapter"
    assert pastina.evaluate(kept, part="dev") == pytest.approx(record["dev"], abs=1e-6)


def test_shards_divide_the_cells(toy_grid: MakeGrid, tmp_path: Path) -> None:
    grid = read_grid(toy_grid())
    runs = [{row["run"] for row in listing(grid, tmp_path, shard=(i, 2))} for i in (1, 2)]
    assert all("pasta" in run for run in runs[0])
    assert all("linear" in run for run in runs[1])
    with pytest.raises(RecipeError, match="--shard 3/2"):
        listing(grid, tmp_path, shard=(3, 2))


# ---------------------------------------------------------------------------------------------------
# Processes


ONE = (
    PLAIN.partition("[methods.linear]")[0]
    .replace("[1, 2]", "[1]")
    .replace(RATES, "rates = [3e-2]\n")
)


def test_kill_and_go_on(toy_grid: MakeGrid, tmp_path: Path) -> None:
    """kill -9 of the command amid a run: its child ends, nothing is lost, the end is the same."""
    path = toy_grid(ONE.replace("epochs = 2", "epochs = 8, save_seconds = 0"))
    run(grid := read_grid(path), tmp_path / "whole")
    args = ["bench", "run", str(path), "--out", "killed"]
    command = processes.start(args, tmp_path, forks_runs=False)
    work = tmp_path / "killed" / WORK
    assert command.wait_until(lambda: bool(list(work.glob("*/state/state.pt"))))
    os.kill(command.pid, signal.SIGKILL)
    assert command.done().code == -signal.SIGKILL
    job = grid.search(grid.cells[0])[0]
    while holder(work / f"{job.id}.lock") is not None:
        time.sleep(0.01)  # its child goes at the next step
    assert read_of(tmp_path / "killed", job) is None, "it was killed before its end"
    done = processes.pastina(*args, folder=tmp_path)
    assert done.code == 0, done.err
    one, other = read_of(tmp_path / "whole", job), read_of(tmp_path / "killed", job)
    assert one is not None
    assert other is not None
    for key in ("dev", "best_epoch", "test", "parameters"):
        assert one[key] == other[key], key
    assert one["epochs"]["loss"] == other["epochs"]["loss"]
    assert "cpu_seconds" in one
    assert "cpu_seconds" not in other, "it was gone on with, not begun again"


def test_two_processes_share_a_grid(toy_grid: MakeGrid, tmp_path: Path) -> None:
    path = toy_grid(PLAIN)
    args = ["bench", "run", str(path), "--out", "shared"]
    ends = [command.done() for command in [processes.start(args, tmp_path) for _ in range(2)]]
    assert [end.code for end in ends] == [0, 0], [end.err for end in ends]
    assert len(records(tmp_path / "shared")) == 6
    told = [line for end in ends for line in end.err.splitlines() if line.startswith("topics/")]
    assert len(told) == len(set(told)) == 6 + 2, told  # two winners are looked at on test


def test_a_job_that_somebody_has_done_by_now_is_not_told_of_again(
    toy_grid: MakeGrid, tmp_path: Path
) -> None:
    grid, told = read_grid(toy_grid(ONE)), []
    work = _Work(grid, grid.cells, tmp_path, keep=False, on_event=told.append)
    (step,) = steps(grid, grid.cells[0], tmp_path)
    assert work._do(step, 1)
    assert isinstance(told.pop(), JobEnd)
    assert not work._do(step, 1), "as one that was found undone a moment before"
    assert not isinstance(told.pop(), JobEnd)


def test_a_job_that_somebody_holds_is_left_alone(toy_grid: MakeGrid, tmp_path: Path) -> None:
    grid = read_grid(toy_grid())
    job = grid.search(grid.cells[0])[0]
    (tmp_path / "out").mkdir()
    with alone(tmp_path / "out", job) as first, alone(tmp_path / "out", job) as second:
        assert (first, second) == (True, False)


def test_ctrl_c_saves_and_the_command_goes_on(toy_grid: MakeGrid, tmp_path: Path) -> None:
    path = toy_grid(ONE.replace("epochs = 2", "epochs = 30"))
    args = ["bench", "run", str(path), "--out", "out"]
    command = processes.start(args, tmp_path)
    work = tmp_path / "out" / WORK
    assert command.wait_until(lambda: bool(list(work.glob("*/metrics.jsonl"))))
    os.kill(command.pid, signal.SIGINT)
    end = command.done()
    assert end.code == 1
    assert "Stopped" in end.err
    assert list(work.glob("*/state/state.pt"))
    assert processes.pastina(*args, folder=tmp_path).code == 0


def test_a_run_that_kills_its_process_is_a_failure(toy_grid: MakeGrid, tmp_path: Path) -> None:
    """As the system does when memory is short: a second chance, then a record that says so."""
    path = toy_grid(ONE.replace("epochs = 2", "epochs = 4000"))
    command = processes.start(["bench", "run", str(path), "--out", "out"], tmp_path)
    job = read_grid(path).search(Cell("topics", "pasta"))[0]
    lock, killed = tmp_path / "out" / WORK / f"{job.id}.lock", [command.pid]
    for _ in range(2):
        assert command.wait_until(lambda: holder(lock) not in (None, *killed))
        pid = holder(lock)
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        killed.append(pid)
    end = command.done()
    assert end.code == 1
    assert "was ended by SIGKILL. Was there too little memory?" in end.err
    record = json.loads(result_path(tmp_path / "out", job).read_text())
    assert "SIGKILL" in record["error"]


def holder(lock: Path) -> int | None:
    """The process that holds a lock, by the system's own list."""
    if not Path("/proc/locks").is_file():
        pytest.skip("the system does not say who holds a lock")
    if not lock.is_file():
        return None
    number = f":{lock.stat().st_ino} "
    for line in Path("/proc/locks").read_text().splitlines():
        if number in line:
            return int(line.split()[4])
    return None


# ---------------------------------------------------------------------------------------------------
# The command


def test_the_command_says_what_is_wrong(toy_grid: MakeGrid, tmp_path: Path) -> None:
    path = toy_grid(PLAIN.replace(RATES, "rates = [1e29, 1e30]\nset.fit.clip = 0\n"))
    for args, code, words in (
        (["nowhere.toml"], 1, "There is no nowhere.toml"),
        ([str(path), "--shard", "two"], 2, "--shard takes I/N"),
        ([str(path), "--only", "lora"], 1, "names no cell"),
        ([str(path), "--only", "pasta"], 1, "2 runs failed; the first: The "),
        ([str(path), "--only", "pasta", "--list"], 0, ""),
    ):
        done = processes.pastina("bench", "run", *args, folder=tmp_path)
        assert done.code == code, done.err
        assert words in done.err
    assert "topics/pasta-lr1e+29-seed1\t" in done.out

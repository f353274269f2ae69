"""Tables, pictures and figures of a grid, from result files that a real (small) grid wrote."""

import csv
import io
import json
import math
import shutil
import statistics
import tomllib
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from pastina.bench.evidence import Labels, bench_evidence, sign_flip_p
from pastina.bench.grid import Cell, Grid, read_grid
from pastina.bench.run import run_grid
from pastina.bench.table import bench_table
from pastina.bench.tally import mean_score, read_tally
from pastina.errors import PastinaError
from pastina.recipe import METHOD_OPTIONS, make_recipe, recipe_toml
from tests import processes
from tests.backbone_folder import toy_recipe, toy_rows, write_rows

GRID = """
name = "toy"
recipes = ["topics", "scores"]
seeds = [1, 2]
base.fit = { precision = "fp32", epochs = 2, batch = 8 }
[methods.linear]
method = "linear"
rates = [1e-2]
[methods.pasta]
method = "pasta"
rates = [1e-2]
[methods.first-positions]
method = { name = "pasta", share = "all" }
rates = [1e-2]
[methods.full]
method = "full"
rates = [1e-2]
"""
SIZES = """
name = "sizes"
recipes = ["topics"]
seeds = [1]
sizes = [20, 60]
base.fit = { precision = "fp32", epochs = 1, batch = 8 }
[methods.linear]
method = "linear"
rates = [1e-2]
"""


@pytest.fixture(scope="module")
def results(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with toy/, on two data sets, and sizes/, on one at two sizes."""
    folder = tmp_path_factory.mktemp("bench")
    for name, kind in (("topics", "classify"), ("scores", "regress")):
        test = write_rows(folder / f"{kind}-test.jsonl", toy_rows(kind, 30, seed=2))
        recipe = toy_recipe(bert, folder, kind, rows=80, data={"test": str(test)})
        (folder / f"{name}.toml").write_text(recipe_toml(recipe), encoding="utf-8")
    for name, text in (("toy", GRID), ("sizes", SIZES)):
        (folder / f"{name}-grid.toml").write_text(text, encoding="utf-8")
    run_grid(read_grid(folder / "toy-grid.toml"), folder / "toy")
    many = toy_recipe(bert, folder, "classify", rows=1100)
    (folder / "topics.toml").write_text(recipe_toml(many), encoding="utf-8")
    run_grid(read_grid(folder / "sizes-grid.toml"), folder / "sizes")
    return folder


@pytest.fixture
def copy(results: Path, tmp_path: Path) -> Path:
    """The results of toy, to be changed."""
    return Path(shutil.copytree(results / "toy", tmp_path / "toy"))


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*/*.json"))]


def points(folder: Path, data: str, method: str) -> list[float]:
    """In points."""
    found = [r for r in records(folder) if (r["data"], r["method"]) == (data, method)]
    return [100 * r["test"][r["metric"]] for r in sorted(found, key=lambda r: r["seed"])]


def rows_of(markdown: str) -> Iterator[list[str]]:
    for line in markdown.splitlines():
        if line.startswith("| ") and not line.startswith("| method"):
            yield [cell.strip() for cell in line.strip("|").split("|")]


# ---------------------------------------------------------------------------------------------------
# Tables


def test_the_numbers_of_a_table_are_those_of_the_files(results: Path) -> None:
    toy = results / "toy"
    rows = {row[0]: row for row in rows_of(bench_table(toy))}
    assert list(rows) == ["linear", "pasta", "first-positions", "full"]
    for method, row in rows.items():
        by_set = [points(toy, data, method) for data in ("topics", "scores")]
        for cell, values in zip(row[1:3], by_set, strict=True):
            assert cell == f"{statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f}"
        means = [statistics.fmean(seed) for seed in zip(*by_set, strict=True)]
        assert row[3] == f"{statistics.fmean(means):.1f} ± {statistics.stdev(means):.1f}"
    backbone = records(toy)[0]["parameters"]["backbone"]
    assert rows["pasta"][4:6] == ["128", f"{100 * 128 / backbone:.3g} %"]  # 2 layers x 2 slots x 32
    assert rows["first-positions"][4] == "64"
    assert rows["linear"][4:6] == ["0", "0 %"]


@pytest.mark.parametrize("format", ["md", "csv", "latex", "html"])
def test_a_table_is_rebuilt_to_the_byte(format: str, results: Path, tmp_path: Path) -> None:
    first = bench_table(results / "toy", format)
    elsewhere = Path(shutil.copytree(results / "toy", tmp_path / "another-name"))
    for path in elsewhere.glob("*/*.json"):
        path.touch()
    assert bench_table(elsewhere, format) == first


def test_csv_is_for_machines(results: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(bench_table(results / "toy", "csv"))))
    assert len(rows) == 8
    for row in rows:
        values = points(results / "toy", row["data"], row["method"])
        assert float(row["test_mean"]) == pytest.approx(statistics.fmean(values))
        assert float(row["test_std"]) == pytest.approx(statistics.stdev(values))
        assert row["seeds"] == "2"
        assert float(row["memory_mb"]) > 50
    sizes = list(csv.DictReader(io.StringIO(bench_table(results / "sizes", "csv"))))
    assert [row["size"] for row in sizes] == ["20", "60"]
    assert sizes[0]["test_std"] == ""


def test_html_and_latex_are_whole(results: Path) -> None:
    class Balance(HTMLParser):
        depth, cells = 0, 0

        def handle_starttag(self, tag: str, attrs: Any) -> None:
            self.depth += tag not in ("meta",)
            self.cells += tag == "td"

        def handle_endtag(self, tag: str) -> None:
            self.depth -= 1

    parser = Balance()
    parser.feed(page := bench_table(results / "toy", "html"))
    assert (parser.depth, parser.cells) == (0, 4 * 7)
    assert "http" not in page.replace("html", "")
    latex = bench_table(results / "toy", "latex")
    body = [line for line in latex.splitlines() if line.endswith(r"\\")]
    assert {line.replace(r"\&", "").count("&") for line in body} == {7}
    assert latex.count("{") == latex.count("}")
    assert r"\%" in latex


def test_notes_say_how_it_was_done(results: Path) -> None:
    notes = bench_table(results / "toy").split("\n\n", 1)[1]
    for words in (
        "seeds 1, 2: accuracy for topics; spearman for scores",
        "topics 80 / 20 / 30",
        "cut at 32 tokens",
        "linear 2, pasta 2",
        "Rates, 1 for each method",
        "16 tested runs",
        "precision fp32",
    ):
        assert words in notes, words
    assert "Failed" not in notes
    assert "Not (wholly) run" not in notes


def test_a_section_for_each_size(results: Path) -> None:
    table = bench_table(results / "sizes")
    assert table.index("**20 training rows**") < table.index("**60 training rows**")
    assert "topics-20 20 / 1,000 / 20" in table


def test_what_is_missing_or_failed_is_shown(copy: Path) -> None:
    (copy / "topics" / "pasta-lr0.01-seed2.json").unlink()
    failed = copy / "scores" / "full-lr0.01-seed1.json"
    record = json.loads(failed.read_text())
    kept = {
        k: record[k] for k in ("id", "grid", "data", "size", "method", "rate", "seed", "recipe")
    }
    failed.write_text(json.dumps({**kept, "error": "The loss became nan."}))
    table = bench_table(copy)
    rows = {row[0]: row for row in rows_of(table)}
    assert rows["pasta"][1].endswith("(1 of 2)")
    assert rows["pasta"][3] == "–", "no mean over sets where a seed is missing"
    assert rows["full"][2] == "failed"
    assert "Failed runs: 1. scores/full 0.01 / · seed 1: The loss became nan." in table
    assert "Not (wholly) run: topics/pasta." in table
    shutil.rmtree(copy / "topics")
    assert {row[1] for row in rows_of(bench_table(copy))} == {"–"}


def test_dev_instead_of_test_carries_a_star(copy: Path) -> None:
    for path in (copy / "topics").glob("linear*.json"):
        record = json.loads(path.read_text())
        path.write_text(json.dumps({**record, "test": {}}))
    table = bench_table(copy)
    assert {row[0] for row in rows_of(table) if row[1].endswith("\\*")} == {"linear"}
    assert "no test row of a data set has a label" in table
    means = {row[0]: row[3] for row in rows_of(table)}
    assert all(mean.endswith("\\*") for mean in means.values() if mean != "–"), means
    row = bench_table(copy, "csv").splitlines()[1].split(",")
    assert row[6:8] == ["", ""]


def test_results_that_are_none(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(PastinaError, match=r"holds no results of a grid: grid\.json is missing"):
        read_tally(tmp_path)
    with pytest.raises(PastinaError, match="no format 'word'; take csv, html, latex, md"):
        bench_table(copy, "word")
    (copy / "topics" / "pasta-lr0.01-seed1.json").write_text("{")
    with pytest.raises(PastinaError, match=r"seed1\.json is not a result of a run"):
        bench_table(copy)
    for text in ("", "[]", "{}", '{"name": 1, "cells": [1], "rates": 1, "seeds": 1, "budget": 1}'):
        (copy / "grid.json").write_text(text)
        with pytest.raises(PastinaError, match="does not describe a grid"):
            read_tally(copy)


def test_the_chosen_rate_counts_and_its_edge_is_told(copy: Path) -> None:
    """Three rates of which the last is best on dev, though another one is better on test."""
    summary = json.loads((copy / "grid.json").read_text())
    summary["rates"]["linear"] = [{"head_lr": rate} for rate in (0.001, 0.003, 0.01)]
    (copy / "grid.json").write_text(json.dumps(summary))
    path = copy / "topics" / "linear-headlr0.01-seed1.json"
    record = json.loads(path.read_text())
    for rate in (0.001, 0.003):
        other = {**record, "rate": {"head_lr": rate}, "dev": {**record["dev"], "accuracy": 0.01}}
        other["test"] = {**record["test"], "accuracy": 1.0}
        path.with_name(f"linear-headlr{rate}-seed1.json").write_text(json.dumps(other))
    tally = read_tally(copy)
    result = tally.results[Cell("topics", "linear")]
    assert result.rate == 2
    assert result.scores()[1] == pytest.approx(100 * record["test"]["accuracy"])
    assert "the first or the last rate of the list won" in bench_table(copy)
    assert tally.results[Cell("scores", "linear")].rate is None, "not all rates were tried"


def test_data_sets_of_a_kind_choose_from_their_own_rates(copy: Path) -> None:
    usual = read_tally(copy)
    summary = json.loads((copy / "grid.json").read_text())
    rates, summary["rates"]["linear"] = summary["rates"]["linear"], [{"head_lr": 7.0}]
    summary["kind_rates"] = {"linear": {"classify": rates}}
    summary["kinds"] = {"topics": "classify", "scores": "regress"}
    (copy / "grid.json").write_text(json.dumps(summary))
    tally, topics = read_tally(copy), Cell("topics", "linear")
    assert tally.results[topics] == usual.results[topics]
    assert tally.results[Cell("scores", "linear")].rate is None, "7.0 was never tried"
    table = bench_table(copy)
    assert "linear · / 7;" in table
    assert "linear (kind classify) · / 0.01" in table
    summary["kinds"] = {"topics": "classify"}
    (copy / "grid.json").write_text(json.dumps(summary))
    with pytest.raises(PastinaError, match="does not describe a grid"):
        read_tally(copy)


# ---------------------------------------------------------------------------------------------------
# Pictures


@pytest.mark.parametrize("count", [1, 2, 8])
def test_a_legend_stays_inside_its_picture(count: int) -> None:
    pytest.importorskip("matplotlib")
    from pastina.bench.plot import _legend, _panels

    figure, panels = _panels(count, 6)
    for method in ("linear", "full", "lora", "pasta", "random-positions", "trainable-tokens"):
        panels[0].plot([1, 2], [1, 2], label=method)
    _legend(figure, panels)
    figure.canvas.draw()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.width


def test_pictures_are_whole_and_the_same_each_time(results: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    from pastina.bench.plot import bench_plot

    written = [*bench_plot(results / "toy", tmp_path / "a" / "toy")]
    written += bench_plot(results / "sizes", tmp_path / "a" / "sizes", ["rows"])
    names = {f"toy-{n}.{e}" for n in ("pareto", "curves") for e in ("png", "svg")}
    assert {path.name for path in written} == names | {"sizes-rows.png", "sizes-rows.svg"}
    again = bench_plot(results / "toy", tmp_path / "b" / "toy")
    for path in again:
        assert path.read_bytes() == (tmp_path / "a" / path.name).read_bytes()
    for path in written:
        if path.suffix == ".png":
            assert imread(path).std() > 0.02, "not an empty sheet"
            continue
        text = path.read_text()
        tags = {element.tag.rpartition("}")[2] for element in ET.fromstring(text).iter()}
        assert {"svg", "title", "desc"} <= tags
    pareto = (tmp_path / "a" / "toy-pareto.svg").read_text()
    assert ">first-positions<" in pareto
    assert "pasta: 128 parameters" in pareto
    curves = (tmp_path / "a" / "toy-curves.svg").read_text()
    assert ">topics<" in curves
    assert ">spearman on dev<" in curves


def test_names_do_not_cover_each_other(results: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from pastina.bench.labels import place_labels

    figure = Figure(figsize=(5, 4))
    FigureCanvasAgg(figure)
    panel = figure.add_subplot()
    panel.set(xlim=(0, 10), ylim=(0, 10))
    place_labels(panel, [(f"method-{i}", 4 + i / 4, 5 + i % 2 / 5) for i in range(6)])
    boxes = [text.get_window_extent() for text in panel.texts]
    assert len(boxes) == 6
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_front() -> None:
    pytest.importorskip("matplotlib")
    from pastina.bench.plot import _front

    spots = [(10.0, 3.0), (1.0, 2.0), (5.0, 1.0), (10.0, 4.0), (20.0, 4.0)]
    assert _front(spots) == [(1.0, 2.0), (10.0, 4.0)]


def test_nothing_to_draw(copy: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from pastina.bench.plot import bench_plot

    with pytest.raises(PastinaError, match="no picture 'pie'; take pareto, curves, rows"):
        bench_plot(copy, tmp_path / "x", ["pie"])
    with pytest.raises(PastinaError, match="nothing to draw"):
        bench_plot(copy, tmp_path / "x", ["rows"])


# ---------------------------------------------------------------------------------------------------
# Evidence


def test_evidence_is_computed_from_the_files(results: Path, tmp_path: Path) -> None:
    toy = results / "toy"
    labels = Labels(best="first-positions", lora="full", ordinary=("first-positions",))
    file = tmp_path / "evidence.json"
    found = bench_evidence([toy, results / "sizes"], labels, file)
    means = {
        (data, method): statistics.fmean(points(toy, data, method))
        for data in ("topics", "scores")
        for method in ("linear", "pasta", "first-positions", "full")
    }
    shares = [
        (means[data, "pasta"] - means[data, "linear"])
        / (means[data, "full"] - means[data, "linear"])
        for data in ("topics", "scores")
        if means[data, "full"] > means[data, "linear"]
    ]
    if shares:
        assert found["gap_closed_pasta"] == pytest.approx(statistics.fmean(shares), rel=1e-3)
    else:
        assert found["gap_closed_pasta"] is None
    differences = [
        special - ordinary
        for data in ("topics", "scores")
        for special, ordinary in zip(
            points(toy, data, "pasta"), points(toy, data, "first-positions"), strict=True
        )
    ]
    assert found["special_vs_ordinary"] == pytest.approx(statistics.fmean(differences), rel=1e-3)
    assert found["special_vs_ordinary_p"] == pytest.approx(sign_flip_p(differences), rel=1e-3)
    against = [
        means[data, "first-positions"] - means[data, "full"] for data in ("topics", "scores")
    ]
    assert found["best_vs_lora"] == pytest.approx(statistics.fmean(against), rel=1e-3)
    small = bench_evidence([toy], replace(labels, small="pasta"))
    wanted = [means[data, "pasta"] - means[data, "full"] for data in ("topics", "scores")]
    assert small["best_vs_lora"] == pytest.approx(statistics.fmean(wanted), rel=1e-3)
    counts = {
        (data, method): record["parameters"]["adapter"]
        for data in ("topics", "scores")
        for method in ("pasta", "full")
        for record in (json.loads(next((toy / data).glob(f"{method}-*-seed1.json")).read_text()),)
    }
    ratios = [counts[data, "pasta"] / counts[data, "full"] for data in ("topics", "scores")]
    assert small["best_vs_lora_parameters_largest"] == pytest.approx(max(ratios), rel=1e-3)
    few = [w for w, ratio in zip(wanted, ratios, strict=True) if ratio <= 0.1]
    assert small["best_vs_lora_where_small"] == pytest.approx(statistics.fmean(few), rel=1e-3)
    of_seeds = seed_shares(toy)
    if len(of_seeds) > 1:
        assert found["gap_closed_pasta_by_seed"] == pytest.approx(
            statistics.fmean(of_seeds), rel=1e-3
        )
        assert found["gap_closed_pasta_sd"] == pytest.approx(statistics.stdev(of_seeds), rel=1e-3)
    assert "4 pairs" in found["how"]["special_vs_first_positions"]
    assert json.loads(file.read_text()) == found
    before = file.read_bytes()
    bench_evidence([toy, results / "sizes"], labels, file)
    assert file.read_bytes() == before


def seed_shares(toy: Path) -> list[float]:
    """For each seed the mean share of the gap that PASTA closes, where there is a gap."""
    shares: dict[int, list[float]] = {}
    for data in ("topics", "scores"):
        columns = [points(toy, data, method) for method in ("linear", "pasta", "full")]
        for seed, (floor, seen, ceiling) in enumerate(zip(*columns, strict=True)):
            if ceiling > floor:
                shares.setdefault(seed, []).append((seen - floor) / (ceiling - floor))
    return [statistics.fmean(own) for own in shares.values()]


def test_evidence_without_runs_is_none_and_says_so(results: Path) -> None:
    found = bench_evidence([results / "sizes"], Labels())
    keys = [f"gap_closed_{name}" for name in ("pasta", "best", "small", "lora")]
    for key in (*keys, "best_vs_lora", "special_vs_ordinary"):
        assert found[key] is None
        assert "ran" in found["how"][key] or "run" in found["how"][key]


@pytest.mark.parametrize("values", [[1.0, 2.0, -0.5, 3.0], [0.0, 0.0], [-1.0] * 10])
def test_sign_flips_are_counted(values: list[float]) -> None:
    """Against the definition: the mean of every pattern of signs."""
    from itertools import product

    means = [
        abs(statistics.fmean(s * v for s, v in zip(signs, values, strict=True)))
        for signs in product((1, -1), repeat=len(values))
    ]
    seen = abs(statistics.fmean(values))
    share = statistics.fmean(mean >= seen - 1e-12 for mean in means)
    assert sign_flip_p(values) == pytest.approx(share)


def test_drawn_signs_agree_with_all_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    from pastina.bench import evidence

    values = [0.5 * math.sin(3 * i) + 0.2 for i in range(16)]
    exact = sign_flip_p(values)
    monkeypatch.setattr(evidence, "_EXACT", 5)
    assert sign_flip_p(values) == pytest.approx(exact, abs=2e-3)
    assert sign_flip_p(values) == sign_flip_p(values)


def test_means() -> None:
    assert mean_score([]) is None
    one, two = mean_score([3.0]), mean_score([1.0, 3.0])
    assert one is not None
    assert two is not None
    assert (one.mean, one.std, one.count) == (3.0, None, 1)
    assert (two.mean, two.std) == (2.0, pytest.approx(math.sqrt(2)))


# ---------------------------------------------------------------------------------------------------
# The commands


def test_the_commands_print_and_write(results: Path, tmp_path: Path) -> None:
    toy = str(results / "toy")
    for args, words in (
        (["table", toy], "| pasta |"),
        (["table", toy, "--format", "csv", "-o", "t.csv"], ""),
        (["plot", toy, "-o", "t", "--only", "pareto"], "t-pareto.svg"),
        (["evidence", toy, "--ordinary", "first-positions", "--json", "e.json"], "special_vs_"),
    ):
        done = processes.pastina("bench", *args, folder=tmp_path)
        assert (done.code, words in done.out) == (0, True), done.err
    assert (tmp_path / "t.csv").read_text() == bench_table(toy, "csv")
    assert json.loads((tmp_path / "e.json").read_text())["special_vs_ordinary"] is not None
    done = processes.pastina("bench", "table", "nowhere", folder=tmp_path)
    assert (done.code, done.out) == (1, "")
    assert "holds no results of a grid" in done.err


# ---------------------------------------------------------------------------------------------------
# The grids that come along

ROOT = Path(__file__).parents[1]
BENCH = ROOT / "recipes" / "bench"
GLUE = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte")


def known(path: Path, folder: Path) -> Grid:
    """The grid of a file, without methods that are not there (yet)."""
    values = tomllib.loads(path.read_text(encoding="utf-8"))
    values["folder"] = str(path.parent / values.get("folder", "."))
    for label, spec in list(values["methods"].items()):
        method = spec["method"]
        if (method if isinstance(method, str) else method["name"]) not in METHOD_OPTIONS:
            del values["methods"][label]
    copy = folder / path.name
    copy.write_text(tomli_w.dumps(values), encoding="utf-8")
    return read_grid(copy)


@pytest.mark.parametrize("path", sorted(BENCH.glob("*.toml")), ids=lambda path: path.stem)
def test_ready_grids_are_valid(path: Path, tmp_path: Path) -> None:
    grid = known(path, tmp_path)
    assert grid.spec.name == path.stem
    assert path.read_text(encoding="utf-8").startswith("# "), "the first line says what it is"
    assert {"pasta"} <= set(grid.spec.methods)
    recipes = [
        job.recipe
        for cell in grid.cells
        for job in grid.search(cell)
        # one that is particular about a kind is another method under its name on the other sets
        if not (own := grid.spec.methods[cell.method].kinds)
        or grid.recipes[cell.data]["kind"] in own
    ]
    assert len({recipe.model_dump_json() for recipe in recipes}) == len(recipes)


def test_the_papers_grid(tmp_path: Path) -> None:
    """Both backbones on GLUE and CoNLL-2003, all by names of the hub."""
    grid = known(BENCH / "paper.toml", tmp_path)
    sets = {
        f"{model}-large-{name}" for model in ("bert", "roberta") for name in (*GLUE, "conll2003")
    }
    assert set(grid.recipes) == sets
    for cell in grid.cells:
        for job in grid.search(cell):
            assert job.recipe.data.hub is not None
            assert job.recipe.data.train is None
            assert job.recipe.backbone.name.split("/")[0] in ("google-bert", "FacebookAI")
            assert len(job.id) == 16, "named without a look at the data"
    pasta = grid.search(Cell("bert-large-rte", "pasta"))[0].recipe
    assert (pasta.fit.epochs, pasta.fit.batch, pasta.fit.lr) == (150, 32, 2.5e-4)


def test_the_low_data_grid(tmp_path: Path) -> None:
    grid = known(BENCH / "lowdata.toml", tmp_path)
    assert grid.spec.sizes == (100, 500, 1000)
    assert len(grid.spec.seeds) == 5
    for cell in grid.cells:
        data = grid.search(cell)[0].recipe.data
        assert (data.limit, data.dev, data.dev_rows) == (cell.size, None, 1000)
        assert data.test is not None


def test_the_main_grid(tmp_path: Path) -> None:
    grid = known(BENCH / "main.toml", tmp_path)
    assert len(grid.recipes) == 8
    for cell in grid.cells:
        recipe = grid.search(cell)[0].recipe
        assert recipe.backbone == make_recipe({}).backbone
        assert (recipe.data.limit, recipe.data.dev_rows) == (2000, 500)

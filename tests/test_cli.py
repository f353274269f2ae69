"""The command line, in processes of its own (see tests/processes.py)."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pastina
from pastina.recipe import METHOD_FIT
from pastina.records import ANSWER_COLUMNS, answer_records, read_texts
from tests import processes
from tests.backbone_folder import toy_rows, write_rows
from tests.processes import Done


def fails(done: Done, *words: str, code: int = 1) -> None:
    """It ended with this code and one sentence on stderr, and wrote nothing to stdout."""
    assert done.code == code, done
    assert done.out == ""
    assert "Traceback" not in done.err
    if code == 1:
        lines = [line for line in done.err.splitlines() if line.strip()]
        assert len(lines) == 1, done.err
        assert lines[0].startswith("pastina: ")
    for word in words:
        assert word in done.err


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture(scope="module")
def work(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows.csv and runs/toys, trained on it by the command line."""
    folder = tmp_path_factory.mktemp("cli") / "work"
    folder.mkdir()
    write_csv(folder / "rows.csv", toy_rows("classify", 60))
    write_rows(folder / "tags.jsonl", toy_rows("tag", 40))
    run = run_train(folder, bert, "toys")
    assert run.code == 0, run.err
    return folder


def run_train(folder: Path, bert: Path, name: str, *more: str) -> Done:
    recipe = [f"name={name}", "data.train=rows.csv", f"backbone={bert}", "fit.epochs=4"]
    rates = ["fit.lr=3e-2", "fit.head_lr=1e-1", "fit.batch=8", "data.max_length=16"]
    return processes.pastina("train", *recipe, *rates, *more, folder=folder)


def call(work: Path, *args: str, stdin: str | None = None) -> Done:
    if stdin is None:
        return processes.pastina(*args, folder=work)
    path = work / "stdin.txt"
    path.write_text(stdin, encoding="utf-8")
    return processes.pastina(*args, folder=work, stdin=path)


# ---------------------------------------------------------------------------------------------------
# Training and looking


def test_training(work: Path, bert: Path) -> None:
    done = run_train(work, bert, "other", "--json")
    assert done.code == 0, done.err
    record = json.loads(done.out)
    assert record["adapter"] == "runs/other/adapter"
    assert record["trained_parameters"] == 2 * 2 * 32 + 2 * 32 + 2
    assert record["dev"]["accuracy"] > 0.7
    assert "epoch 4/4" in done.err
    assert "(best so far)" in done.err
    fails(run_train(work, bert, "other"), "runs/other exists and is not empty")


def test_training_for_people(work: Path, bert: Path) -> None:
    done = run_train(work, bert, "shown", "--out", "elsewhere/run")
    assert done.code == 0
    assert done.out.startswith("adapter: elsewhere/run/adapter (")
    assert "accuracy" in done.err
    assert "parameters" in done.err


def test_evaluation(work: Path) -> None:
    done = call(work, "evaluate", "runs/toys", "rows.csv", "--json")
    assert done.code == 0, done.err
    metrics = json.loads(done.out)
    assert metrics == pastina.evaluate(work / "runs" / "toys", work / "rows.csv")
    table = call(work, "evaluate", "runs/toys/adapter", "rows.csv")
    assert f"accuracy\t{metrics['accuracy']:.4f}" in table.out
    dev = call(work, "evaluate", "runs/toys", "--part", "dev", "--json")
    assert json.loads(dev.out)["accuracy"] > 0.7
    fails(call(work, "evaluate", "runs/toys"), "has no test part")
    fails(call(work, "evaluate", "runs/toys", "--part", "tset"), "no part 'tset'")


def test_tasks(work: Path) -> None:
    broken = work / "broken" / "task.json"
    broken.parent.mkdir(exist_ok=True)
    broken.write_text("{}")
    done = call(work, "tasks", ".", "--json")
    assert done.code == 0, done.err
    records = {record["path"]: record for record in json.loads(done.out)}
    assert "missing" in records["broken"]["error"]
    toys = records["runs/toys/adapter"]
    assert (toys["name"], toys["kind"], toys["labels"]) == ("toys", "classify", ["fruit", "tool"])
    assert 1000 < toys["bytes"] < 20000
    lines = call(work, "tasks", ".").out.splitlines()
    assert lines[0].split("\t")[:3] == ["task", "kind", "labels"]
    (line,) = [line for line in lines if line.startswith("runs/toys/adapter\t")]
    assert toys["digest"][:12] in line
    (work / "none").mkdir(exist_ok=True)
    empty = call(work, "tasks", "none")
    assert (empty.code, empty.out, empty.err) == (0, "", "No adapters in none.\n")
    fails(call(work, "tasks", "nowhere"), "There is no folder nowhere")


def test_methods_and_recipe(work: Path) -> None:
    methods = json.loads(call(work, "methods", "--json").out)
    assert [method["name"] for method in methods] == list(METHOD_FIT)
    for method in methods:
        assert {"name", "paper", "fits", "options"} <= set(method)
        assert method["paper"].startswith("https://")
    assert methods[0]["options"]["init_std"] == 0.02
    assert "arxiv.org/abs/2210.04382" in call(work, "methods").out

    done = call(work, "recipe", "kind=tag", "method=linear")
    assert done.code == 0
    (work / "linear.toml").write_text(done.out)
    again = call(work, "recipe", "linear.toml", "--json")
    assert json.loads(again.out)["method"] == {"name": "linear"}
    assert json.loads(again.out)["fit"]["lr"] is not None


def test_doctor(work: Path) -> None:
    done = call(work, "doctor", "--json")
    report = json.loads(done.out)
    assert done.code == (1 if report["complaint"] else 0)
    packages = {row[0]: row[1] for row in report["packages"]}
    assert packages["torch"]
    assert packages["peft"]
    names = [row[0] for row in report["backbones"]]
    assert names[0] == "sentence-transformers/all-MiniLM-L6-v2"
    assert report["device"][-1][:2] in (["used", "cpu"], ["used", "cuda"])
    assert "SHA-256" in call(work, "doctor").out or "not usable" in report["backbones"][0]


# ---------------------------------------------------------------------------------------------------
# Predicting

TEXTS = ["please send me a pear", "the drill, now", "we need ünïcode ☃ nail"]


@pytest.fixture(scope="module")
def answers(work: Path) -> list[dict[str, Any]]:
    """What the library says to TEXTS."""
    predictions = pastina.load(work / "runs" / "toys").predict(TEXTS)
    return [{"text": t, **answer.as_dict()} for t, answer in zip(TEXTS, predictions, strict=True)]


def records(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def assert_like(found: list[dict[str, Any]], answers: list[dict[str, Any]]) -> None:
    assert [r["text"] for r in found] == [a["text"] for a in answers]
    assert [r["label"] for r in found] == [a["label"] for a in answers]
    for record, answer in zip(found, answers, strict=True):
        assert float(record["score"]) == pytest.approx(answer["score"], abs=1e-5)
        scores = record["scores"]
        scores = json.loads(scores) if isinstance(scores, str) else scores
        assert scores == pytest.approx(answer["scores"], abs=1e-5)


def test_texts_as_arguments_and_lines(work: Path, answers: list[dict[str, Any]]) -> None:
    done = call(work, "predict", "runs/toys", *TEXTS)
    assert done.code == 0, done.err
    assert_like(records(done.out), answers)
    lines = call(work, "predict", "runs/toys", "--json", stdin="\n".join(TEXTS))
    assert_like(records(lines.out), answers)
    table = call(work, "predict", "runs/toys", "--format", "csv", *TEXTS)
    assert_like(list(csv.DictReader(io.StringIO(table.out))), answers)
    bom = call(work, "predict", "runs/toys", stdin="\ufeff" + TEXTS[0] + "\r\n")
    assert_like(records(bom.out), answers[:1])


def test_a_csv_becomes_a_csv(work: Path, answers: list[dict[str, Any]]) -> None:
    """Its columns stay; a column called label is what somebody gave, not the answer."""
    given = [{"id": str(i), "text": t, "label": "mine, “quoted”"} for i, t in enumerate(TEXTS)]
    write_csv(work / "in.csv", given)
    done = call(work, "predict", "runs/toys", "--file", "in.csv", "--out", "new/out.csv")
    assert (done.code, done.out) == (0, ""), done.err
    with (work / "new" / "out.csv").open(newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    assert list(found[0]) == ["id", "text", "given_label", *ANSWER_COLUMNS["classify"]]
    assert [row["id"] for row in found] == ["0", "1", "2"]
    assert {row["given_label"] for row in found} == {"mine, “quoted”"}
    assert {row["truncated"] for row in found} == {"False"}
    assert_like(found, answers)


def test_jsonl_becomes_jsonl(work: Path, answers: list[dict[str, Any]]) -> None:
    rows = [{"text": t, "deep": {"list": [1, None]}} for t in TEXTS] + [{"text": "x " * 50}]
    write_rows(work / "in.jsonl", rows)
    done = call(work, "predict", "runs/toys", "-f", "in.jsonl", "-o", "out.jsonl")
    assert done.code == 0, done.err
    found = records((work / "out.jsonl").read_text(encoding="utf-8"))
    assert found[0]["deep"] == {"list": [1, None]}
    assert "truncated" not in found[0]
    assert found[3]["truncated"] is True
    assert_like(found[:3], answers)
    write_rows(work / "odd.jsonl", [{"text": "a"}, {"text": "b", "more": 1}])
    odd = call(work, "predict", "runs/toys", "-f", "odd.jsonl", "-o", "odd.csv")
    fails(odd, "Row 2 has the column 'more'")
    assert not (work / "odd.csv").exists()


def test_spans_and_pairs(work: Path, bert: Path) -> None:
    fit = ["fit.epochs=8", "fit.lr=3e-2", "fit.head_lr=1e-1", "fit.batch=8", f"backbone={bert}"]
    fit += ["data.max_length=16", "data.stride=4"]
    tag = ["kind=tag", "data.train=tags.jsonl"]
    done = call(work, "train", *tag, *fit, "--out", "runs/tags")
    assert done.code == 0, done.err
    text = "please send pear now"
    (record,) = records(call(work, "predict", "runs/tags", text).out)
    assert [text[s["start"] : s["end"]] for s in record["spans"]] == ["pear"]
    table = call(work, "predict", "runs/tags", text, "--format", "csv").out
    (row,) = csv.DictReader(io.StringIO(table))
    assert json.loads(row["spans"]) == record["spans"]

    write_rows(work / "pairs.jsonl", toy_rows("pair", 40))
    done = call(work, "train", "data.train=pairs.jsonl", *fit, "--out", "runs/pairs")
    assert done.code == 0, done.err
    both = call(work, "predict", "runs/pairs", "please", "pear", "please", "nail")
    lines = call(work, "predict", "runs/pairs", stdin="please\tpear\nplease\tnail\n")
    assert records(both.out) == records(lines.out)
    assert [record["text_pair"] for record in records(both.out)] == ["pear", "nail"]
    fails(call(work, "predict", "runs/pairs", "please"), "reads pairs of texts; 1 texts")
    fails(call(work, "predict", "runs/pairs", stdin="please pear\n"), "line 1", "with a TAB")


def test_rows_that_cannot_be_answered_may_be_left_out(work: Path) -> None:
    texts = ["pear", "a [SEP] b", "nail", " ", "saw"]
    done = call(work, "predict", "runs/toys", "--keep-going", *texts)
    assert done.code == 0, done.err
    found = records(done.out)
    assert [record["text"] for record in found] == texts
    assert ["label" in record for record in found] == [True, False, True, False, True]
    assert "3 special tokens" in found[1]["error"]
    assert "text 4: " in found[3]["error"]


# ---------------------------------------------------------------------------------------------------
# Streams


def test_answers_come_before_the_input_ends(work: Path) -> None:
    pipe = work / "pipe"
    os.mkfifo(pipe)
    command = processes.start(["predict", "runs/toys"], work, stdin=pipe)
    with pipe.open("w") as lines:
        lines.writelines(f"send pear {number}\n" for number in range(1100))
        lines.flush()
        out = command.folder / "out"
        assert command.wait_until(lambda: out.is_file() and out.read_bytes().count(b"\n") >= 1024)
        lines.write("and a last one\n")
    done = command.done()
    assert done.code == 0, done.err
    texts = [record["text"] for record in records(done.out)]
    assert texts == [f"send pear {number}" for number in range(1100)] + ["and a last one"]


@pytest.fixture(scope="module")
def large(work: Path) -> Path:
    """A table of 20,000 texts."""
    path = work / "large.csv"
    path.write_text("text\n" + "".join(f"pear {number}\n" for number in range(20_000)))
    return path


def test_a_file_is_read_as_it_is_answered(work: Path, large: Path) -> None:
    """Its rows never stand in memory together."""
    predictor: Any = pastina.load(work / "runs" / "toys")
    alive = most = 0

    def counted() -> Iterator[Any]:
        nonlocal alive, most
        for pair in read_texts(predictor.card, None, large, sys.stdin):
            alive += 1
            most = max(most, alive)
            yield pair

    found = answer_records(predictor, counted())
    for number in range(3000):
        record = next(found)
        alive -= 1
        assert record["text"] == f"pear {number}"
    assert most <= 2048


def test_ctrl_c_while_predicting(work: Path) -> None:
    pipe = work / "quiet"
    os.mkfifo(pipe)
    command = processes.start(["predict", "runs/toys"], work, stdin=pipe)
    with pipe.open("w") as lines:
        lines.write("pear\n")
        lines.flush()
        threading.Event().wait(4.0)  # it loads, then waits for lines
        os.kill(command.pid, signal.SIGINT)
        done = command.done()
    fails(done, "stopped")


def test_a_reader_that_goes_away(work: Path, large: Path) -> None:
    """As with `| head -1`; a real process with a real pipe."""
    with subprocess.Popen(
        [sys.executable, "-m", "pastina.cli", "predict", "runs/toys", "-f", str(large)],
        cwd=work,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert json.loads(process.stdout.readline())["text"] == "pear 0"
        process.stdout.close()
        errors = process.stderr.read()
    assert process.returncode == 1
    assert "Traceback" not in errors
    assert "BrokenPipe" not in errors


# ---------------------------------------------------------------------------------------------------
# What goes wrong


def test_errors_are_one_sentence(work: Path, bert: Path) -> None:
    fails(call(work, "train", "fit.epoch=3"), "unknown key 'fit.epoch'", "'epochs'")
    fails(call(work, "train", "none.toml"), "There is no recipe none.toml")
    fails(call(work, "train", "data.train=row.csv"), "row.csv does not exist", "rows.csv")
    fails(call(work, "train"), "No training data is named")
    fails(call(work, "train", "--resume"), "Name its folder")
    fails(call(work, "train", "--resume", "--out", "x"), "nothing to resume in x")
    fails(call(work, "train", "data.train=rows.csv", "backbone=no/such"), "'no/such' is neither")
    fails(call(work, "evaluate", "nowhere"), "nowhere is not an adapter")
    fails(call(work, "predict", "nowhere", "a"), "nowhere is not an adapter")
    fails(call(work, "predict", "runs/toys", "-f", "none.csv"), "none.csv does not exist")
    fails(call(work, "predict", "runs/toys", " "), "text 1: the text is empty")
    fails(call(work, "predict", "runs/toys", "a [SEP] b"), "3 special tokens", "a [SEP] b")
    fails(call(work, "predict", "runs/toys", "pear", "-o", "runs"), "runs is a folder")
    assert list(work.glob(".runs*")) == [], "nothing half-written remains"


def test_bad_files(work: Path, bert: Path) -> None:
    (work / "ragged.csv").write_text("text,label\na,fruit\nb,tool,extra\n")
    ragged = call(work, "train", "data.train=ragged.csv", f"backbone={bert}")
    fails(ragged, "ragged.csv, line 3", "3 fields, but the header has 2")
    assert not (work / "runs" / "run").exists()
    fails(call(work, "evaluate", "runs/toys", "ragged.csv"), "ragged.csv, line 3")
    (work / "latin.csv").write_bytes(b"text\npear\nb\xe4r\n")
    latin = call(work, "predict", "runs/toys", "-f", "latin.csv", "-o", "latin-out.csv")
    fails(latin, "latin.csv, line 3, column 2")
    assert list(work.glob("*latin-out*")) == list(work.glob(".latin*")) == []
    (work / "bytes").write_bytes(b"pear\n\xff\xfe\n")
    done = processes.pastina("predict", "runs/toys", folder=work, stdin=work / "bytes")
    assert done.code == 1
    assert done.err.startswith("pastina: Standard input is not UTF-8")


@pytest.mark.parametrize(
    "args",
    [
        ["fly"],
        ["train", "--fast"],
        ["tune", "a.toml", "b.toml"],
        ["train", "--max-tokens", "5"],
        ["evaluate", "run", "--precision", "fp64"],
        ["predict"],
        ["predict", "runs/toys", "a", "--file", "b.csv"],
        ["predict", "runs/toys", "a", "--format", "xml"],
        ["predict", "runs/toys", "a", "--format", "csv", "--json"],
        ["predict", "runs/toys", "a", "--text", "text"],
        ["predict", "runs/toys", "--file", "rows.csv", "--out", "./rows.csv"],
    ],
    ids=" ".join,
)
def test_wrong_usage(work: Path, args: list[str]) -> None:
    fails(call(work, *args), "Usage: pastina", code=2)


def test_help(work: Path) -> None:
    for verb in ("train", "evaluate", "predict", "tasks", "methods", "recipe", "doctor"):
        done = call(work, verb, "--help")
        assert done.code == 0
        assert f"pastina {verb}" in done.out
        assert "--json" in done.out

"""The examples run by hand without arguments; here each runs in a folder of its own."""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pastina.adapter import list_adapters, read_card
from pastina.recipe import make_recipe

EXAMPLES = Path(__file__).parents[1] / "examples"
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")

Runner = Callable[[str], list[str]]


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Runner:
    """Runs an example as `python examples/NAME FOLDER` does; returns the lines that it prints."""

    def run_example(name: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", [name, str(tmp_path)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run_example


def test_own_csv(run: Runner, tmp_path: Path) -> None:
    lines = run("own_csv.py")
    assert lines[0].startswith("accuracy ")
    assert [line.split(" ")[0] for line in lines[1:]] == ["track", "refund"]
    assert read_card(tmp_path / "run" / "adapter").labels == ("refund", "track")


def test_tagger_from_label_studio(run: Runner, tmp_path: Path) -> None:
    lines = run("tagger_from_label_studio.py")
    assert lines[0].startswith("f1 ")
    assert any(line.startswith("date: 5 August") for line in lines[1:])
    card = read_card(tmp_path / "run" / "adapter")
    assert (card.kind, card.labels) == ("tag", ("date", "product"))


def test_peft_sequence_classification(run: Runner) -> None:
    lines = run("peft_sequence_classification.py")
    assert lines[0].startswith("trainable params: 258 ||")
    seven, nine, again = (float(line.split()[-1]) for line in (lines[1], lines[2], lines[4]))
    assert seven > 0.85
    assert nine > 0.85
    assert again == nine
    assert lines[3].startswith("one text, three answers: [")


def test_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of it but the training: one epoch on a few rows."""
    monkeypatch.setattr(sys, "argv", ["demo.py", str(tmp_path)])
    demo = runpy.run_path(str(EXAMPLES / "demo.py"))
    whole = demo["sample_recipe"]

    def short(task: str, kind: str) -> Any:
        values = whole(task, kind).model_dump(exclude_unset=True)
        short_data = {**values["data"], "limit": 16}
        return make_recipe({**values, "data": short_data, "fit": {"epochs": 1}})

    monkeypatch.setitem(demo["main"].__globals__, "sample_recipe", short)
    demo["main"]()
    out = capsys.readouterr().out
    assert "intents: accuracy 0." in out
    assert "orders: f1 0." in out
    found = dict(list_adapters(tmp_path))
    assert {path.parent.name for path in found} == {"intents", "orders"}
    assert all(str(path) in out for path in found)


def test_every_example_is_run_here() -> None:
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    tests = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert names <= tests

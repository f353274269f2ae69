"""A run that was killed ends with the bytes of one that was not."""

import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

import pastina
from pastina.errors import PastinaError, RecipeError
from pastina.recipe import Recipe, recipe_toml
from pastina.training import fit as fit_module
from pastina.training import loop as loop_module
from pastina.training.events import Event, Step
from pastina.training.loop import Stopped
from tests import processes
from tests.backbone_folder import toy_recipe, toy_rows, write_rows

Toy = Callable[..., Recipe]
FIT = {"epochs": 4, "lr": 3e-2, "head_lr": 1e-1, "patience": 4}


def history(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def weights(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def assert_same(one: Path, other: Path) -> None:
    assert weights(one) == weights(other)
    assert history(one) == history(other)
    ours, theirs = (json.loads((f / "result.json").read_text()) for f in (one, other))
    for key in ("dev", "best_epoch", "epochs", "steps", "data_digest"):
        assert ours[key] == theirs[key]
    assert list(one.rglob(".*")) == [], "nothing half-written remains"


# ---------------------------------------------------------------------------------------------------
# Killed as a process


@pytest.fixture(scope="module")
def work(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with recipe.toml and `straight`, the run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("resume")
    recipe = toy_recipe(bert, folder, "tag", rows=48, fit=FIT | {"save_seconds": 0})
    (folder / "recipe.toml").write_text(recipe_toml(recipe))
    done = processes.pastina("train", "recipe.toml", "--out", "straight", folder=folder)
    assert done.code == 0, done.err
    return folder


@pytest.mark.slow
def test_killed_again_and_again(work: Path) -> None:
    """At its very start, after the first state, at the end of epochs, and while the adapter is made."""
    run, draw = work / "killed", random.Random(0)
    args = ["train", "recipe.toml", "--out", "killed"]
    moments: list[Callable[[], bool]] = [
        lambda: (run / "recipe.toml").is_file(),
        lambda: (run / "state" / "state.pt").is_file(),
        lambda: len(history(run)) >= 1 if (run / "metrics.jsonl").is_file() else False,
        lambda: len(history(run)) >= 3,
        lambda: any(run.glob(".adapter.*")) or (run / "adapter").is_dir(),
    ]
    killed = 0
    for moment in moments:
        command = processes.start(args, work)
        command.wait_until(moment)
        command.process.join(draw.uniform(0, 0.03))
        if command.process.is_alive():
            os.kill(command.pid, signal.SIGKILL)
        killed += command.done().code == -signal.SIGKILL
        assert (run / "recipe.toml").is_file()
        args = ["train", "--resume", "--out", "killed"]
    assert killed >= 3
    done = processes.pastina(*args, folder=work)
    assert done.code == 0, done.err
    assert_same(run, work / "straight")


def test_ctrl_c(work: Path) -> None:
    run = work / "stopped"
    command = processes.start(["train", "recipe.toml", "--out", "stopped"], work)
    assert command.wait_until(lambda: (run / "state" / "state.pt").is_file())
    os.kill(command.pid, signal.SIGINT)
    done = command.done()
    assert done.code == 1
    assert "Traceback" not in done.err
    assert "Stopped in epoch" in done.err
    assert "Go on with: pastina train --resume --out stopped" in done.err
    assert not (run / "adapter").exists()
    done = processes.pastina("train", "--resume", "--out", "stopped", "--json", folder=work)
    assert done.code == 0, done.err
    assert json.loads(done.out)["adapter"] == "stopped/adapter"
    assert_same(run, work / "straight")


# ---------------------------------------------------------------------------------------------------
# Stopped inside this process, at every step


class Killed(BaseException):
    """Nothing that the library could catch."""


def stop_at(step: int) -> Callable[[Event], None]:
    def on_event(event: Event) -> None:
        if isinstance(event, Step) and event.step == step:
            raise Killed

    return on_event


@pytest.mark.parametrize(
    "sections",
    [
        {"fit": {"epochs": 2, "save_seconds": 0}},
        {"fit": {"epochs": 2, "save_seconds": 0}, "method": {"name": "full"}},
        {"fit": {"epochs": 2, "save_seconds": 0, "class_weights": "balanced", "precision": "bf16"}},
        {"fit": {"epochs": 2}},  # states only at the end of epochs
    ],
    ids=["pasta", "full", "bf16", "by-epoch"],
)
def test_after_any_step(toy: Toy, tmp_path: Path, sections: dict[str, Any]) -> None:
    recipe = toy(rows=24, dev_rows=10, **sections)
    straight = pastina.train(recipe, tmp_path / "straight").folder
    run, resume = tmp_path / "run", False
    for step in (1, 3, 4, 5):
        with pytest.raises(Killed):
            pastina.train(recipe, run, resume=resume, on_event=stop_at(step))
        resume = True
        torch.rand(5)  # the new process starts with other random numbers
    pastina.train(recipe, run, resume=True)
    assert_same(run, straight)


@pytest.mark.parametrize("where", ["_write_history", "save"])
def test_at_the_end_of_an_epoch(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Metrics of an epoch are written before its state; each may be the last that happens."""
    recipe = toy(rows=24, dev_rows=10, fit={"epochs": 3})
    straight = pastina.train(recipe, tmp_path / "straight").folder
    calls, whole = [], getattr(loop_module.Loop, where)

    def second_fails(loop: Any) -> None:
        calls.append(where)
        if len(calls) == 2:
            raise Killed
        whole(loop)

    with monkeypatch.context() as patch:
        patch.setattr(loop_module.Loop, where, second_fails)
        with pytest.raises(Killed):
            pastina.train(recipe, tmp_path / "run")
    pastina.train(recipe, tmp_path / "run", resume=True)
    assert_same(tmp_path / "run", straight)


def test_while_the_adapter_is_written(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*args: Any) -> None:
        raise Killed

    recipe = toy(fit={"epochs": 1})
    straight = pastina.train(recipe, tmp_path / "straight").folder
    with monkeypatch.context() as patch:
        patch.setattr(fit_module, "save_adapter", killed)
        with pytest.raises(Killed):
            pastina.train(recipe, tmp_path / "run")
    (tmp_path / "run" / ".adapter.77.new").mkdir()  # what kill -9 would leave
    (tmp_path / "run" / "state" / ".state.pt.abc").touch()
    pastina.train(recipe, tmp_path / "run", resume=True)
    assert_same(tmp_path / "run", straight)


def test_a_finished_run_resumes_to_itself(toy: Toy, tmp_path: Path) -> None:
    recipe = toy(fit={"epochs": 1})
    first = pastina.train(recipe, tmp_path / "run")
    before, records = weights(first.folder), history(first.folder)
    again = pastina.train(recipe, tmp_path / "run", resume=True)
    assert (weights(again.folder), history(again.folder)) == (before, records)
    assert again.metrics == first.metrics


def test_sigterm_saves_too(toy: Toy, tmp_path: Path) -> None:
    recipe = toy(rows=24, fit={"epochs": 2})

    def terminate(event: Event) -> None:
        if isinstance(event, Step) and event.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match="after step 2 of 6"):
        pastina.train(recipe, tmp_path / "run", on_event=terminate)
    assert signal.getsignal(signal.SIGTERM) is before
    steps: list[int] = []
    pastina.train(
        recipe,
        tmp_path / "run",
        resume=True,
        on_event=lambda event: steps.append(event.step) if isinstance(event, Step) else None,
    )
    assert steps == [3, 4, 5, 6]


# ---------------------------------------------------------------------------------------------------
# What cannot be resumed


@pytest.fixture
def begun(toy: Toy, tmp_path: Path) -> tuple[Recipe, Path]:
    """A run that was killed after its second step, and its recipe."""
    recipe = toy(rows=24, dev_rows=10, fit={"epochs": 2, "save_seconds": 0})
    with pytest.raises(Killed):
        pastina.train(recipe, tmp_path / "run", on_event=stop_at(2))
    return recipe, tmp_path / "run"


def test_nothing_to_resume(toy: Toy, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"nothing to resume .* holds no recipe"):
        pastina.train(toy(), tmp_path / "nowhere", resume=True)
    assert not (tmp_path / "nowhere").exists()


def test_while_another_process_trains_there(begun: tuple[Recipe, Path]) -> None:
    recipe, folder = begun
    theirs = folder / ".adapter.77.new"
    theirs.mkdir()
    with FileLock(folder / fit_module.LOCK), pytest.raises(RecipeError, match="Another process"):
        pastina.train(recipe, folder, resume=True)
    assert theirs.is_dir(), "what it writes at this moment is left alone"


def test_another_recipe(begun: tuple[Recipe, Path], toy: Toy) -> None:
    with pytest.raises(RecipeError, match="begun with another recipe"):
        pastina.train(toy(fit={"epochs": 3}), begun[1], resume=True)


def test_other_data(begun: tuple[Recipe, Path]) -> None:
    recipe, folder = begun
    assert recipe.data.dev is not None
    write_rows(Path(recipe.data.dev), toy_rows("classify", 10, seed=5))
    with pytest.raises(RecipeError, match="The data changed since the run"):
        pastina.train(recipe, folder, resume=True)
    assert not (folder / "adapter").exists()


def test_another_backbone(begun: tuple[Recipe, Path], bert: Path) -> None:
    recipe, folder = begun
    path = folder / "state" / "state.pt"
    state = torch.load(path, weights_only=True)
    torch.save(state | {"backbone": "0" * 64}, path)
    with pytest.raises(RecipeError, match="The backbone changed since the run"):
        pastina.train(recipe, folder, resume=True)


def test_another_number_of_processes(begun: tuple[Recipe, Path]) -> None:
    recipe, folder = begun
    path = folder / "state" / "state.pt"
    state = torch.load(path, weights_only=True)
    torch.save(state | {"random": state["random"] * 2}, path)
    with pytest.raises(RecipeError, match="with 2 processes, this is 1"):
        pastina.train(recipe, folder, resume=True)


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("content", ["garbage", "empty", "half", "list", "part", "code"])
def test_a_state_that_is_none(begun: tuple[Recipe, Path], content: str) -> None:
    recipe, folder = begun
    path, mark = folder / "state" / "state.pt", folder / "was-here"
    state = torch.load(path, weights_only=True)
    match content:
        case "garbage" | "empty":
            path.write_bytes(b"garbage" if content == "garbage" else b"")
        case "half":
            path.write_bytes(path.read_bytes()[:-200])
        case "list":
            torch.save([1], path)
        case "part":
            torch.save({"data": state["data"], "backbone": state["backbone"]}, path)
        case "code":
            torch.save(state | {"progress": Evil(mark)}, path)
    with pytest.raises(PastinaError, match="cannot be read as the state of a run") as caught:
        pastina.train(recipe, folder, resume=True)
    assert "\n" not in str(caught.value)
    assert not mark.exists(), "nothing in a state is executed"

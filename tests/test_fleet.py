"""Adapters trained together end as if each had been trained alone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

import pastina
from pastina.engine import RememberingEngine, families
from pastina.engine.packed import Joint
from pastina.errors import PastinaError, RecipeError
from pastina.recipe import Recipe, recipe_toml
from pastina.training import prepare as prepare_module
from pastina.training.events import EpochEnd, Event, Note, OfMember, Step
from pastina.training.fit import Run
from pastina.training.fleet import train_fleet
from pastina.training.loop import Loop
from tests import processes
from tests.backbone_folder import toy_recipe

Toy = Callable[..., Recipe]
FP32 = {"precision": "fp32", "lr": 3e-2, "head_lr": 3e-2, "batch": 8, "epochs": 2}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def assert_as_alone(recipe: Recipe, run: Run | PastinaError, alone: Path) -> None:
    assert isinstance(run, Run), run
    wanted = pastina.train(recipe, alone)
    assert run.best_epoch == wanted.best_epoch
    assert run.metrics == pytest.approx(wanted.metrics, abs=1e-4)
    found, expected = tensors(run.folder), tensors(alone)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-5, msg=name)


def break_member(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The optimiser of the member in this folder fails in the middle of the run."""
    learn = Loop.learn

    def breaks(loop: Loop) -> None:
        if loop.folder.name == name and loop.progress.step == 2:
            raise ArithmeticError("value cannot be converted")
        learn(loop)

    monkeypatch.setattr(Loop, "learn", breaks)


def mixed(toy: Toy) -> list[Recipe]:
    """All kinds, other rates, seeds, batches, poolings, slots and lengths of run."""
    return [
        toy(fit=FP32),
        toy(fit=FP32 | {"lr": 1e-2, "epochs": 3, "seed": 3}),
        toy("tag", fit=FP32 | {"batch": 5}),
        toy("pair", fit=FP32, head={"pooling": "mean"}, method={"name": "pasta", "share": "all"}),
        toy("regress", fit=FP32, head={"pooling": "mean"}, method={"name": "pasta", "layers": [1]}),
        toy("multilabel", fit=FP32, method={"name": "linear"}),
    ]


def test_every_kind_ends_as_if_alone(toy: Toy, tmp_path: Path) -> None:
    recipes = mixed(toy)
    runs = train_fleet(recipes, [tmp_path / f"member-{i}" for i in range(len(recipes))])
    for i, (recipe, run) in enumerate(zip(recipes, runs, strict=True)):
        assert_as_alone(recipe, run, tmp_path / f"alone-{i}")


@pytest.mark.parametrize("precision", ["bf16", "int8"])
@pytest.mark.parametrize("way", ["kernels", "PyTorch"])
def test_members_end_as_if_alone_in_other_precisions(
    way: str, precision: str, toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients in int8 are rounded at random, those of each member with its own numbers."""
    if way == "PyTorch":
        monkeypatch.setattr("pastina.engine.families.can_fuse", lambda *_: False)
    recipes = []
    for recipe in mixed(toy):
        fit = recipe.fit.model_copy(update={"precision": precision})
        recipes.append(recipe.model_copy(update={"fit": fit}))
    runs = train_fleet(recipes, [tmp_path / f"member-{i}" for i in range(len(recipes))])
    for i, (recipe, run) in enumerate(zip(recipes, runs, strict=True)):
        assert_as_alone(recipe, run, tmp_path / f"alone-{i}")


@pytest.mark.parametrize("name", ["roberta", "distilbert", "modernbert"])
def test_architectures(name: str, backbones: Callable[[str], Path], tmp_path: Path) -> None:
    recipes = [
        toy_recipe(backbones(name), tmp_path, fit=FP32 | {"seed": seed, "epochs": 1})
        for seed in (1, 2)
    ]
    runs = train_fleet(recipes, [tmp_path / "0", tmp_path / "1"])
    for i, (recipe, run) in enumerate(zip(recipes, runs, strict=True)):
        assert_as_alone(recipe, run, tmp_path / f"alone-{i}")


def test_backbones_that_the_packed_engine_does_not_know(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(families, "FAMILIES", {})
    recipes = [toy(fit=FP32 | {"seed": seed, "epochs": 1}) for seed in (1, 2)]
    runs = train_fleet(recipes, [tmp_path / "0", tmp_path / "1"])
    for i, (recipe, run) in enumerate(zip(recipes, runs, strict=True)):
        assert_as_alone(recipe, run, tmp_path / f"alone-{i}")
        result = json.loads((tmp_path / f"{i}" / "result.json").read_text())
        assert result["engine"] == "reference"


def test_passes_are_shared(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    inner = Joint.states

    def counted(joint: Joint, *args: Any) -> Any:
        if torch.is_grad_enabled():
            sizes.append(len(joint.batches))
        return inner(joint, *args)

    monkeypatch.setattr(Joint, "states", counted)
    recipes = [toy(fit=FP32 | {"seed": seed}) for seed in range(4)]
    train_fleet(recipes, [tmp_path / str(i) for i in range(4)])
    assert sizes == [4] * 10, "two epochs of five batches, all four members in each pass"


def test_data_and_backbone_are_read_once(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for name in ("load_backbone", "load_dataset", "encode"):
        inner = getattr(prepare_module, name)

        def counted(*args: Any, _name: str = name, _inner: Any = inner, **kwargs: Any) -> Any:
            calls.append(_name)
            return _inner(*args, **kwargs)

        monkeypatch.setattr(prepare_module, name, counted)
    recipes = [toy(fit=FP32 | {"lr": lr, "epochs": 1}) for lr in (1e-2, 2e-2, 3e-2)]
    train_fleet(recipes, [tmp_path / str(i) for i in range(3)])
    assert sorted(calls) == ["encode", "encode", "load_backbone", "load_dataset"]


def test_members_that_wait_and_members_that_stop_early(toy: Toy, tmp_path: Path) -> None:
    """A budget of one token: one at a time. The first has patience 1 and a rate that learns nothing."""
    still = FP32 | {"lr": 1e-9, "head_lr": 1e-9, "epochs": 6, "patience": 1}
    recipes = [toy(fit=still), toy(fit=FP32), toy(fit=FP32 | {"seed": 2})]
    heard: list[Event] = []
    runs = train_fleet(
        recipes, [tmp_path / str(i) for i in range(3)], on_event=heard.append, max_tokens=1
    )
    order = [event.name for event in heard if isinstance(event, OfMember)]
    assert order == sorted(order), "no member began before the one before it had ended"
    ends = [e for e in heard if isinstance(e, OfMember) and isinstance(e.event, EpochEnd)]
    assert sum(e.name == str(tmp_path / "0") for e in ends) == 2
    for i in range(3):
        assert_as_alone(recipes[i], runs[i], tmp_path / f"alone-{i}")


def test_one_that_stops_early_leaves_the_others_as_they_were(toy: Toy, tmp_path: Path) -> None:
    still = FP32 | {"lr": 1e-9, "head_lr": 1e-9, "epochs": 6, "patience": 1}
    recipes = [toy(fit=still), toy(fit=FP32 | {"epochs": 4})]
    runs = train_fleet(recipes, [tmp_path / "0", tmp_path / "1"])
    for i in range(2):
        assert_as_alone(recipes[i], runs[i], tmp_path / f"alone-{i}")


def test_members_that_fail_hurt_nobody(toy: Toy, tmp_path: Path) -> None:
    """One diverges in the middle, one has no data, one finds its folder taken."""
    (tmp_path / "3").mkdir()
    (tmp_path / "3" / "notes.txt").write_text("mine")
    recipes = [
        toy(fit=FP32),
        toy(fit=FP32 | {"lr": 1e30, "clip": 0}),
        toy("tag", fit=FP32, data={"train": "nowhere.jsonl"}),
        toy(fit=FP32),
        toy("tag", fit=FP32),
    ]
    notes: list[str] = []

    def hear(event: Event) -> None:
        assert isinstance(event, OfMember)
        if isinstance(event.event, Note):
            notes.append(event.event.text)

    runs = train_fleet(recipes, [tmp_path / str(i) for i in range(5)], on_event=hear)
    assert [isinstance(run, PastinaError) for run in runs] == [False, True, True, True, False]
    assert "became" in str(runs[1])
    assert "nowhere.jsonl" in str(runs[2])
    assert "not empty" in str(runs[3])
    assert len(notes) == 3
    assert not (tmp_path / "1" / "adapter").exists()
    assert not (tmp_path / "2").exists(), "it never began"
    assert [path.name for path in (tmp_path / "3").iterdir()] == ["notes.txt"]
    assert_as_alone(recipes[0], runs[0], tmp_path / "alone-0")
    assert_as_alone(recipes[4], runs[4], tmp_path / "alone-4")


@pytest.mark.parametrize("way", ["kernels", "PyTorch"])
def test_numbers_that_are_none_stay_with_their_member(
    way: str, toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of all members, of any length, go through the backbone side by side."""
    if way == "PyTorch":
        monkeypatch.setattr("pastina.engine.families.can_fuse", lambda *_: False)
    recipes = [toy(fit=FP32 | {"lr": 1e30, "warmup": 0.0}), toy(fit=FP32), toy("tag", fit=FP32)]
    failed, *runs = train_fleet(recipes, [tmp_path / f"member-{i}" for i in range(3)])
    assert isinstance(failed, PastinaError)
    assert "became nan" in str(failed)
    for i, (recipe, run) in enumerate(zip(recipes[1:], runs, strict=True)):
        assert_as_alone(recipe, run, tmp_path / f"alone-{i}")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_a_member_with_biases_leaves_the_others_as_they_were(
    precision: str, toy: Toy, tmp_path: Path
) -> None:
    fit = FP32 | {"precision": precision}
    with_biases = {"name": "pasta", "bias_layers": [0, 1]}
    recipes = [toy(fit=fit), toy(fit=fit, method=with_biases), toy("tag", fit=fit)]
    runs = train_fleet(recipes, [tmp_path / f"member-{i}" for i in range(3)])
    for i, (recipe, run) in enumerate(zip(recipes, runs, strict=True)):
        assert_as_alone(recipe, run, tmp_path / f"alone-{i}")


def test_nothing_is_kept_of_members_that_are_done(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pastina.training.fleet._SWEEP", 2)
    kept: list[int] = []
    prepare = Accelerator.prepare

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        kept.append(len(self._models))
        return prepare(self, *args, **kwargs)

    monkeypatch.setattr(Accelerator, "prepare", counted)
    recipes = [toy(rows=8, fit=FP32 | {"epochs": 1, "seed": seed}) for seed in range(6)]
    train_fleet(recipes, [tmp_path / str(i) for i in range(6)], max_tokens=1)
    assert len(kept) == 6
    assert max(kept) < 2


def test_an_error_that_nobody_foresaw_hurts_nobody(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes = [toy(fit=FP32), toy(fit=FP32), toy("tag", fit=FP32)]
    break_member(monkeypatch, "1")
    runs = train_fleet(recipes, [tmp_path / str(i) for i in range(3)])
    assert [isinstance(run, PastinaError) for run in runs] == [False, True, False]
    assert "ArithmeticError: value cannot" in str(runs[1])
    for i in (0, 2):
        assert_as_alone(recipes[i], runs[i], tmp_path / f"alone-{i}")


def test_a_member_without_slots_checks_none_for_the_others(toy: Toy, tmp_path: Path) -> None:
    methods = ({"name": "linear"}, {"name": "pasta", "num_slots": 1}, {"name": "pasta"})
    recipes = [toy(method=method, fit=FP32) for method in methods]
    runs = train_fleet(recipes, [tmp_path / str(i) for i in range(3)])
    assert [isinstance(run, Run) for run in runs] == [True, False, True]
    assert "2 special tokens but 1 slots" in str(runs[1])


def test_what_lies_below_is_worked_out_once_for_all(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    inner = RememberingEngine.remember

    def counted(engine: RememberingEngine, *args: Any) -> Any:
        calls.append(engine.start)
        return inner(engine, *args)

    monkeypatch.setattr(RememberingEngine, "remember", counted)
    upper = {"name": "pasta", "layers": [1]}
    recipes = [
        toy(fit=FP32 | {"lr": lr}, method=method)
        for method in (upper, {"name": "linear"})
        for lr in (1e-2, 3e-2)
    ]
    runs = train_fleet(recipes, [tmp_path / str(i) for i in range(4)])
    assert calls == [1, 2]
    for i, (recipe, run) in enumerate(zip(recipes, runs, strict=True)):
        assert_as_alone(recipe, run, tmp_path / f"alone-{i}")


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", [3, 11, 19])
def test_resumes_to_the_same_bytes(toy: Toy, tmp_path: Path, moment: int) -> None:
    fit = FP32 | {"save_seconds": 0}
    int8 = fit | {"precision": "int8"}
    recipes = [toy(fit=fit), toy(fit=int8 | {"epochs": 1}), toy("tag", fit=int8), toy(fit=int8)]
    straight = train_fleet(recipes, [tmp_path / f"straight-{i}" for i in range(4)])
    outs = [tmp_path / f"killed-{i}" for i in range(4)]
    steps = 0

    def stop(event: Event) -> None:
        nonlocal steps
        steps += isinstance(event, OfMember) and isinstance(event.event, Step)
        if steps == moment:
            raise Killed

    with pytest.raises(Killed):
        train_fleet(recipes, outs, on_event=stop)
    torch.rand(7)
    runs = train_fleet(recipes, outs, resume=True)
    for run, wanted in zip(runs, straight, strict=True):
        assert isinstance(run, Run)
        assert isinstance(wanted, Run)
        found, expected = tensors(run.folder), tensors(wanted.folder)
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-5, msg=name)


def test_refusals(toy: Toy, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="the same folder"):
        train_fleet([toy(), toy()], [tmp_path / "a", tmp_path / "a"])
    with pytest.raises(RecipeError, match="full fine-tuning"):
        train_fleet([toy(method={"name": "full"})], [tmp_path / "a"])
    with pytest.raises(RecipeError, match="trackers"):
        train_fleet([toy(fit={"report_to": ["tensorboard"]})], [tmp_path / "a"])
    assert list(tmp_path.glob("a*")) == []


def test_command(toy: Toy, tmp_path: Path) -> None:
    for name, lr in (("slow", 1e-3), ("fast", 3e-2)):
        (tmp_path / f"{name}.toml").write_text(recipe_toml(toy(fit=FP32 | {"lr": lr})))
    names = ["slow.toml", "fast.toml"]
    done = processes.pastina("train", *names, "fit.epochs=1", "--out", "all", folder=tmp_path)
    assert done.code == 0, done.err
    lines = [line.split("\t") for line in done.out.splitlines()]
    assert [line[0] for line in lines] == ["task", "slow", "fast"]
    assert (tmp_path / "all" / "fast" / "adapter" / "task.json").is_file()
    again = processes.pastina("train", *names, "fit.epochs=1", "--out", "all", folder=tmp_path)
    assert again.code == 1
    assert "2 of 2 failed" in again.err
    assert "Traceback" not in again.err
    more = ["fit.epochs=1", "--out", "all", "--resume", "--json"]
    resumed = processes.pastina("train", *names, *more, folder=tmp_path)
    assert resumed.code == 0, resumed.err
    assert [set(record["dev"]) >= {"accuracy"} for record in json.loads(resumed.out)] == [True] * 2

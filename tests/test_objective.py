"""What a recipe adds to the loss, and to the way of learning: by its formula, and in runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

import pastina
from pastina.data.read import load_dataset
from pastina.errors import AdapterError, DataError, RecipeError
from pastina.kinds import KINDS
from pastina.recipe import FitSpec, Recipe
from pastina.training.average import Average
from pastina.training.events import Event, Step
from pastina.training.fit import Run
from pastina.training.fleet import train_fleet
from pastina.training.objective import Objective
from pastina.training.prepare import prepare
from tests.backbone_folder import TOPICS, toy_recipe, toy_rows, write_rows

Toy = Callable[..., Recipe]
FAST: dict[str, Any] = {"lr": 3e-2, "head_lr": 1e-1, "batch": 8, "precision": "fp32"}


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def assert_near(one: Path, other: Path) -> None:
    found, wanted = weights(one), weights(other)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-4, msg=name)


def losses(kind: str, logits: Tensor, targets: Tensor, taught: Any = None, **fit: Any) -> Tensor:
    return Objective(KINDS[kind], FitSpec(**fit), None).losses(logits, targets, taught)


# ---------------------------------------------------------------------------------------------------
# Formulas

ONE, OTHER = torch.tensor([[1.0, -1.0, 0.5]]), torch.tensor([[0.0, 2.0, 0.5]])


def kl(one: Tensor, other: Tensor) -> Tensor:
    return (one * (one / other).log()).sum(-1)


def test_label_smoothing() -> None:
    found = losses("classify", ONE, torch.tensor([0]), label_smoothing=0.3)
    log = ONE.log_softmax(-1)[0]
    assert float(found) == pytest.approx(float(-0.7 * log[0] - 0.3 * log.mean()))
    weighted = Objective(KINDS["tag"], FitSpec(label_smoothing=0.3), torch.tensor([4.0, 1.0, 1.0]))
    assert float(weighted.losses(ONE, torch.tensor([0]), None)) == pytest.approx(4 * float(found))


def test_consistency() -> None:
    both, targets = torch.cat([ONE, OTHER]), torch.tensor([0, 0])
    plain = F.cross_entropy(both, targets)
    p, q = ONE.softmax(-1), OTHER.softmax(-1)
    wanted = plain + 0.7 * (kl(p, q) + kl(q, p)) / 2
    torch.testing.assert_close(losses("classify", both, targets, consistency=0.7), wanted)
    numbers = losses("regress", both[:, :1], torch.tensor([0.0, 0.0]), consistency=2.0)
    assert float(numbers) == pytest.approx((1 + 0) / 2 + 2.0 * 1.0)
    sets = losses("multilabel", both, torch.zeros(2, 3), consistency=1.0)
    p, q = ONE.sigmoid(), OTHER.sigmoid()
    apart = kl(torch.stack([p, 1 - p], -1), torch.stack([q, 1 - q], -1))
    apart += kl(torch.stack([q, 1 - q], -1), torch.stack([p, 1 - p], -1))
    wanted = F.binary_cross_entropy_with_logits(both, torch.zeros(2, 3)) + apart.mean(-1) / 2
    torch.testing.assert_close(sets, wanted)


def test_a_teacher() -> None:
    fit: dict[str, Any] = {"teacher": "a run", "teacher_weight": 0.25, "teacher_temperature": 3.0}
    found = losses("classify", ONE, torch.tensor([0]), OTHER, **fit)
    heat = kl((OTHER / 3).softmax(-1), (ONE / 3).softmax(-1)) * 9
    torch.testing.assert_close(found, 0.75 * F.cross_entropy(ONE, torch.tensor([0])) + 0.25 * heat)
    number = losses("regress", ONE[:, :1], torch.tensor([3.0]), OTHER[:, :1], **fit)
    assert float(number) == pytest.approx(0.75 * 4 + 0.25 * 1)
    for kind, targets in (("classify", torch.tensor([0])), ("multilabel", torch.ones(1, 3))):
        same = losses(kind, ONE, targets, ONE, **fit | {"teacher_weight": 1.0})
        assert float(same) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("kind", ["regress", "multilabel"])
def test_kinds_without_classes_are_not_smoothed(kind: str, toy: Toy, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=f"label_smoothing means nothing for {kind}"):
        pastina.train(toy(kind, fit={"label_smoothing": 0.1}), tmp_path / "run")
    assert not (tmp_path / "run" / "adapter").exists()


def test_average() -> None:
    parameter = torch.nn.Parameter(torch.tensor([1.0]))
    average = Average({"a": parameter}, 0.5)
    wanted = 1.0
    for step, value in enumerate([2.0, -1.0, 4.0, 0.0, 3.0, 3.0, 1.0, 7.0, 5.0, 2.0, 6.0]):
        with torch.no_grad():
            parameter.fill_(value)
        average.update(step)
        share = min(0.5, (1 + step) / (10 + step))
        wanted = share * wanted + (1 - share) * value
    assert float(average.tensors["a"]) == pytest.approx(wanted)
    with average.in_place():
        assert parameter.item() == pytest.approx(wanted)
    assert parameter.item() == 6.0


# ---------------------------------------------------------------------------------------------------
# Runs


def test_equal_masks_leave_nothing_to_be_consistent_with(toy: Toy, tmp_path: Path) -> None:
    method, head = {"name": "pasta", "dropout": 0.0}, {"dropout": 0.0}
    plain = toy(method=method, head=head, fit=FAST)
    twice = toy(method=method, head=head, fit=FAST | {"consistency": 5.0})
    one, other = pastina.train(plain, tmp_path / "1"), pastina.train(twice, tmp_path / "2")
    assert_near(one.folder, other.folder)


@pytest.fixture(scope="module")
def teachers(
    bert: Path, backbones: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Trained runs by kind, on another backbone than their pupils."""
    root = tmp_path_factory.mktemp("teachers")

    def folder(kind: str) -> Path:
        if not (root / kind).is_dir():
            fit = FAST | {"epochs": 8}
            recipe = toy_recipe(backbones("distilbert"), root, kind, rows=64, dev_rows=30, fit=fit)
            pastina.train(recipe, root / kind)
        return root / kind

    return folder


@pytest.mark.parametrize("kind", ["classify", "pair", "multilabel", "regress", "tag"])
def test_a_teacher_is_asked_for_its_own_answers(
    kind: str, toy: Toy, teachers: Callable[[str], Path]
) -> None:
    """On another backbone with other windows; a regression's in the pupil's units."""
    fit = FAST | {"teacher": str(teachers(kind))}
    recipe = toy(kind, rows=12, fit=fit, data={"max_length": 12 if kind == "tag" else 32})
    recipe = recipe.resolved()
    prepared = prepare(recipe, lambda event: None)
    assert prepared.teacher is not None
    predictor = pastina.load(teachers(kind), precision="fp32")
    rows = load_dataset(recipe.kind, recipe.data, recipe.fit.seed).train
    for example, logits in zip(prepared.examples, prepared.teacher.logits, strict=True):
        row = rows[example.row]
        (answer,) = predictor.predict_rows([row])
        if kind == "tag":
            assert len(logits) == len(example.word_index or ())
        elif kind == "regress":
            mean, deviation = prepared.target_scale
            assert answer.value == pytest.approx(float(logits) * deviation + mean, abs=1e-4)
        else:
            assert logits.shape == (1, 2)
            shares = logits[0].sigmoid() if kind == "multilabel" else logits[0].softmax(-1)
            assert list((answer.scores or {}).values()) == pytest.approx(shares.tolist(), abs=1e-5)


def test_a_pupil_learns_what_only_its_teacher_knows(
    toy: Toy, teachers: Callable[[str], Path], tmp_path: Path
) -> None:
    """Labels of its own data are drawn; with the teacher's answers alone it learns the task."""
    recipe = toy(rows=64, dev_rows=30, fit=FAST | {"epochs": 8})
    drawn = toy_rows("classify", 64)
    for number, row in enumerate(drawn):
        row["label"] = list(TOPICS)[number // 2 % 2]
    data = recipe.data.model_copy(
        update={"train": str(write_rows(tmp_path / "drawn.jsonl", drawn))}
    )
    taught = recipe.fit.model_copy(
        update={"teacher": str(teachers("classify")), "teacher_weight": 1.0}
    )
    pupil = recipe.model_copy(update={"data": data, "fit": taught})
    run = pastina.train(pupil, tmp_path / "pupil")
    alone = pastina.train(recipe.model_copy(update={"data": data}), tmp_path / "alone")
    assert run.metrics["accuracy"] > 0.85
    assert alone.metrics["accuracy"] < run.metrics["accuracy"] - 0.1
    assert pastina.read_recipe(run.folder / "recipe.toml").fit.teacher == taught.teacher


def test_teachers_that_are_refused(
    toy: Toy, teachers: Callable[[str], Path], tmp_path: Path
) -> None:
    classify = FAST | {"teacher": str(teachers("classify"))}
    with pytest.raises(RecipeError, match="answers classify, the recipe is of the kind regress"):
        pastina.train(toy("regress", fit=classify), tmp_path / "run")
    with pytest.raises(DataError, match="reads single texts"):
        pastina.train(toy("pair", fit=classify), tmp_path / "run")
    with pytest.raises(AdapterError, match="not an adapter"):
        pastina.train(toy(fit=FAST | {"teacher": str(tmp_path / "none")}), tmp_path / "run")
    rows = [{"text": row["text"], "label": row["label"] + "s"} for row in toy_rows("classify", 20)]
    files = dict.fromkeys(("train", "dev", "test"), str(write_rows(tmp_path / "other.jsonl", rows)))
    with pytest.raises(RecipeError, match="has other labels than the data: 'fruit'"):
        pastina.train(toy(fit=classify, data=files), tmp_path / "run")


def everything(kind: str, teachers: Callable[[str], Path]) -> dict[str, Any]:
    smoothing = {"label_smoothing": 0.1} if kind in ("classify", "tag") else {}
    return (
        FAST
        | smoothing
        | {
            "consistency": 1.0,
            "teacher": str(teachers(kind)),
            "ema": 0.9,
            "layer_decay": 0.8,
            "schedule": "cosine",
        }
    )


@pytest.mark.parametrize("kind", ["classify", "regress", "tag"])
def test_resumed_and_in_a_fleet(
    kind: str, toy: Toy, teachers: Callable[[str], Path], tmp_path: Path
) -> None:
    """A run that was broken off ends with the same bytes; a member of a fleet as if alone."""
    fit = everything(kind, teachers) | {"save_seconds": 0, "epochs": 3}
    recipe = toy(kind, rows=24, dev_rows=10, fit=fit)
    straight = pastina.train(recipe, tmp_path / "straight")

    def breaks(event: Event) -> None:
        if isinstance(event, Step) and event.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pastina.train(recipe, tmp_path / "broken", on_event=breaks)
    resumed = pastina.train(recipe, tmp_path / "broken", resume=True)
    found, wanted = weights(resumed.folder), weights(straight.folder)
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    metrics = pastina.evaluate(straight.adapter, part="dev", precision="fp32")
    assert metrics == pytest.approx(straight.metrics, abs=1e-6), "the average is what is kept"

    others = [recipe, toy(kind, rows=24, dev_rows=10, fit=FAST | {"epochs": 2})]
    members = train_fleet(others, [tmp_path / "a", tmp_path / "b"])
    assert all(isinstance(run, Run) for run in members), members
    assert_near(tmp_path / "a", straight.folder)
    assert_near(tmp_path / "b", pastina.train(others[1], tmp_path / "alone").folder)


def test_another_teacher_cannot_go_on(
    toy: Toy, teachers: Callable[[str], Path], tmp_path: Path
) -> None:
    import shutil

    shutil.copytree(teachers("classify") / "adapter", tmp_path / "teacher")
    fit = FAST | {"teacher": str(tmp_path / "teacher"), "save_seconds": 0}
    recipe = toy(fit=fit)

    def breaks(event: Event) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pastina.train(recipe, tmp_path / "run", on_event=breaks)
    pastina.train(recipe, tmp_path / "run", resume=True)
    shutil.rmtree(tmp_path / "teacher")
    other = pastina.train(toy(fit=FAST | {"epochs": 1}), tmp_path / "other")
    shutil.copytree(other.adapter, tmp_path / "teacher")
    shutil.rmtree(tmp_path / "run" / "adapter")
    with pytest.raises(RecipeError, match="The teacher changed since"):
        pastina.train(recipe, tmp_path / "run", resume=True)

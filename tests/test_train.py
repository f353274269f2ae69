import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import pastina
from pastina.errors import BackboneError, PastinaError, RecipeError
from pastina.recipe import Recipe
from pastina.training import fit as fit_module
from pastina.training.events import EpochEnd, Event, Note, Step
from pastina.training.loop import lr_share
from pastina.training.score import Scorer
from tests.backbone_folder import TOPICS, toy_recipe, write_rows

Toy = Callable[..., Recipe]
FAST = {"epochs": 8, "lr": 3e-2, "head_lr": 1e-1}


def history(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def without_seconds(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The models of the runs of a test, as they were when their adapters were written."""
    models, save = [], fit_module.save_adapter

    def spy(model: Any, *args: Any) -> Any:
        models.append(model)
        return save(model, *args)

    monkeypatch.setattr(fit_module, "save_adapter", spy)
    return models


def feign_metrics(monkeypatch: pytest.MonkeyPatch, values: list[float]) -> Iterator[float]:
    """Every call of the scorer takes the next value."""
    left = iter(values)
    monkeypatch.setattr(Scorer, "score", lambda *args: {"accuracy": next(left)})
    return left


# ---------------------------------------------------------------------------------------------------
# It learns


@pytest.mark.parametrize(
    ("kind", "metric", "chance"),
    [
        ("classify", "accuracy", 0.5),
        ("pair", "accuracy", 0.5),
        ("multilabel", "micro_f1", 0.67),
        ("regress", "spearman", 0.0),
        ("tag", "f1", 0.0),
    ],
)
def test_every_kind_learns(
    toy: Toy, tmp_path: Path, bert: Path, saved: list[Any], kind: str, metric: str, chance: float
) -> None:
    run = pastina.train(toy(kind, rows=64, dev_rows=30, fit=FAST), tmp_path / "run")
    records = history(run.folder)
    assert records[-1]["loss"] < 0.6 * records[0]["loss"]
    assert run.metric == metric
    assert run.metrics[metric] > chance + 0.25
    assert run.metrics[metric] == max(record["dev"][metric] for record in records)
    assert run.metrics == records[run.best_epoch - 1]["dev"]

    # the backbone is what it was, bit for bit, and only vectors and head learned
    backbone = saved[0].base_model.model.bert.state_dict()
    frozen = {k.replace("base_layer.", ""): v for k, v in backbone.items() if "pasta_" not in k}
    stored = load_file(bert / "model.safetensors")
    assert set(stored) - set(frozen) <= {"pooler.dense.weight", "pooler.dense.bias"}
    assert all(torch.equal(tensor, stored[name]) for name, tensor in frozen.items())
    learned = [name for name, p in saved[0].named_parameters() if p.requires_grad]
    assert len(learned) == 4
    assert all("pasta_vectors" in n or "classifier.modules_to_save" in n for n in learned)
    assert run.trained_parameters == sum(
        t.numel() for t in load_file(run.adapter / "adapter_model.safetensors").values()
    )


@pytest.mark.parametrize("method", ["linear", "full"])
def test_the_other_methods_learn(
    toy: Toy, tmp_path: Path, bert: Path, saved: list[Any], method: str
) -> None:
    fit = {"epochs": 6, "lr": 1e-3 if method == "full" else 1e-1}
    recipe = toy(rows=64, dev_rows=30, method={"name": method}, fit=fit)
    run = pastina.train(recipe, tmp_path / "run")
    records = history(run.folder)
    assert records[-1]["loss"] < records[0]["loss"]
    assert run.metrics["accuracy"] > 0.7
    stored = load_file(bert / "model.safetensors")
    same = [
        torch.equal(tensor, stored[name])
        for name, tensor in saved[0].base_model.model.bert.state_dict().items()
    ]
    if method == "linear":
        assert all(same)
        assert run.trained_parameters == 32 * 2 + 2
    else:
        assert not any(same[:3])
        assert run.trained_parameters == sum(t.numel() for t in stored.values()) + 32 * 2 + 2
    answers = pastina.load(run.adapter).predict(["please send pear", "please send drill"])
    assert [answer.label for answer in answers] == list(TOPICS)


def test_two_rates(toy: Toy, tmp_path: Path) -> None:
    """With a rate of nothing the vectors stay at 0 while the head learns."""
    method = {"name": "pasta", "init_std": 0.0}
    recipe = toy(method=method, fit={"epochs": 2, "lr": 1e-30, "head_lr": 0.1})
    run = pastina.train(recipe, tmp_path / "run")
    tensors = load_file(run.adapter / "adapter_model.safetensors")
    vectors = [tensor for name, tensor in tensors.items() if "pasta_vectors" in name]
    head = next(tensor for name, tensor in tensors.items() if "classifier.bias" in name)
    assert vectors
    assert all(float(tensor.abs().max()) < 1e-25 for tensor in vectors)
    assert float(head.abs().max()) > 0.01


def test_a_seed_gives_the_same_bytes_and_another_one_others(toy: Toy, tmp_path: Path) -> None:
    def adapter(name: str, seed: int) -> bytes:
        run = pastina.train(toy(fit={"epochs": 1, "seed": seed}), tmp_path / name)
        torch.rand(3)  # what happens between runs does not matter
        return (run.adapter / "adapter_model.safetensors").read_bytes()

    one = adapter("one", 1)
    assert adapter("again", 1) == one
    assert adapter("other", 2) != one


def test_bf16_on_the_cpu(toy: Toy, tmp_path: Path) -> None:
    run = pastina.train(toy(fit={**FAST, "precision": "bf16"}), tmp_path / "run")
    records = history(run.folder)
    assert records[-1]["loss"] < records[0]["loss"]
    tensors = load_file(run.adapter / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("weights", "share"), [(None, 0.25), ("balanced", 0.5), ({"tool": 9.0}, 0.75)]
)
def test_class_weights(toy: Toy, bert: Path, tmp_path: Path, weights: Any, share: float) -> None:
    """One text with two labels, 30 to 10: what is learned is the weighted share."""
    rows = [{"text": "the", "label": "tool" if i % 4 == 0 else "fruit"} for i in range(40)]
    path = write_rows(tmp_path / "same.jsonl", rows)
    recipe = toy(
        method={"name": "linear"},
        head={"dropout": 0.0},
        data={"train": str(path), "dev": str(path)},
        fit={"epochs": 40, "head_lr": 0.1, "class_weights": weights},
    )
    run = pastina.train(recipe, tmp_path / "run")
    adapter = torch.load(run.folder / "state" / "state.pt", weights_only=True)["trained"]
    weight = next(t for n, t in adapter.items() if n.endswith("default.weight"))
    assert weight.shape == (2, 32)
    losses = [record["loss"] for record in history(run.folder)]
    # at the best share p the loss is the weighted entropy of the labels
    heavy, light = (9.0, 1.0) if isinstance(weights, dict) else (1.0, 1.0)
    if weights == "balanced":
        heavy, light = 40 / (2 * 10), 40 / (2 * 30)
    best = -(10 * heavy * math.log(share) + 30 * light * math.log(1 - share)) / 40
    assert losses[-1] == pytest.approx(best, rel=0.05)


# ---------------------------------------------------------------------------------------------------
# Epochs


def test_the_best_epoch_is_kept(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: list[Any]
) -> None:
    feign_metrics(monkeypatch, [0.5, 0.9, 0.9, 0.7])
    events: list[Event] = []
    run = pastina.train(toy(fit={"epochs": 4}), tmp_path / "run", on_event=events.append)
    assert (run.best_epoch, run.metrics) == (2, {"accuracy": 0.9})
    assert [e.is_best for e in events if isinstance(e, EpochEnd)] == [True, True, False, False]
    state = torch.load(run.folder / "state" / "state.pt", weights_only=True)
    adapter = load_file(run.adapter / "adapter_model.safetensors")
    for name, tensor in adapter.items():
        ending = name.rpartition("classifier.")[2] if "classifier" in name else ""
        key = next(
            k
            for k in state["best"]
            if (k.endswith(f"default.{ending}") if ending else k.startswith(name))
        )
        assert torch.equal(state["best"][key], tensor)
        assert not torch.equal(state["trained"][key], tensor)

    feign_metrics(monkeypatch, [0.5, 0.9])
    with_two = pastina.train(toy(fit={"epochs": 2, "schedule": "constant"}), tmp_path / "two")
    feign_metrics(monkeypatch, [0.5, 0.9, 0.1])
    with_three = pastina.train(toy(fit={"epochs": 3, "schedule": "constant"}), tmp_path / "three")
    one, other = (
        (r.adapter / "adapter_model.safetensors").read_bytes() for r in (with_two, with_three)
    )
    assert len(one) == len(other)


def test_early_stopping(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = feign_metrics(monkeypatch, [0.5, 0.6, 0.6, 0.55, 0.9])
    run = pastina.train(toy(fit={"epochs": 5, "patience": 2}), tmp_path / "run")
    assert run.best_epoch == 2
    assert len(history(run.folder)) == 4
    assert list(left) == [0.9], "the fifth epoch did not happen"


def test_dev_is_scored_after_every_second_epoch_and_the_last(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    often = pastina.train(toy(fit={"epochs": 5}), tmp_path / "often")
    left = feign_metrics(monkeypatch, [0.5, 0.9, 0.7])
    events: list[Event] = []
    fit = {"epochs": 5, "score_every": 2}
    run = pastina.train(toy(fit=fit), tmp_path / "run", on_event=events.append)
    assert not list(left)
    assert (run.best_epoch, run.metrics) == (4, {"accuracy": 0.9})
    ends = [event for event in events if isinstance(event, EpochEnd)]
    assert [end.is_best for end in ends] == [False, True, False, True, False]
    assert [end.metrics.get("accuracy") for end in ends] == [None, 0.5, None, 0.9, 0.7]
    records = history(run.folder)
    assert [record["dev"] for record in records] == [end.metrics for end in ends]
    assert [r["loss"] for r in records] == [r["loss"] for r in history(often.folder)]
    one, other = (
        torch.load(folder / "state" / "state.pt", weights_only=True)["trained"]
        for folder in (run.folder, often.folder)
    )
    assert all(torch.equal(one[name], other[name]) for name in one), "scoring changes no step"


def test_answers_that_are_no_numbers_are_no_result(toy: Toy, tmp_path: Path) -> None:
    """The loss of the last step was finite; what it led to is not."""
    for kind in ("classify", "multilabel", "regress", "tag"):
        fit = {"epochs": 1, "batch": 64, "warmup": 0.0, "lr": 1e30, "head_lr": 1e30}
        with pytest.raises(PastinaError, match=r"on dev became nan in epoch 1, step 1.*Lower fit"):
            pastina.train(toy(kind, rows=20, fit=fit), tmp_path / kind)
        assert not (tmp_path / kind / "adapter").exists()


def test_patience_counts_epochs_though_few_are_scored(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = feign_metrics(monkeypatch, [0.6, 0.5, 0.9])
    fit = {"epochs": 9, "score_every": 3, "patience": 2}
    run = pastina.train(toy(fit=fit), tmp_path / "run")
    assert (run.best_epoch, len(history(run.folder))) == (3, 6)
    assert list(left) == [0.9]


def test_an_error_is_better_when_it_is_lower(toy: Toy, tmp_path: Path) -> None:
    run = pastina.train(toy("regress", fit={**FAST, "metric": "rmse"}), tmp_path / "run")
    assert run.metrics["rmse"] == min(record["dev"]["rmse"] for record in history(run.folder))


def test_events_and_files(toy: Toy, tmp_path: Path) -> None:
    events: list[Event] = []
    recipe = toy(name="toys", rows=20, fit={"epochs": 2, "batch": 8}, data={"max_length": 8})
    run = pastina.train(recipe, tmp_path / "run", on_event=events.append)
    steps = [event for event in events if isinstance(event, Step)]
    assert [(s.step, s.total_steps, s.epoch) for s in steps] == [
        (step, 6, 1 if step <= 3 else 2) for step in range(1, 7)
    ]
    notes = [event.text for event in events if isinstance(event, Note)]
    assert len(notes) == 1
    assert "longer than data.max_length = 8" in notes[0]
    records = history(run.folder)
    assert [(r["epoch"], r["step"]) for r in records] == [(1, 3), (2, 6)]
    assert pastina.read_recipe(run.folder / "recipe.toml") == recipe.resolved()
    result = json.loads((run.folder / "result.json").read_text())
    assert (result["metric"], result["dev"]) == ("accuracy", run.metrics)
    assert result["rows"] == {"train": 20, "dev": 20, "test": 20}
    assert {"seed", "recipe", "versions", "machine", "backbone", "data_digest"} <= set(result)
    assert result["adapter_digest"] == pastina.load(run.folder).card.digest
    assert list(run.folder.rglob(".*")) == [], "nothing half-written remains"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # tensorboard's own
def test_trackers(toy: Toy, tmp_path: Path) -> None:
    recipe = toy(fit={"epochs": 1, "report_to": ["tensorboard"]})
    run = pastina.train(recipe, tmp_path / "run")
    (events,) = run.folder.rglob("events.out.tfevents.*")
    assert b"dev/accuracy" in events.read_bytes()


@pytest.mark.parametrize("tracker", ["wandb", "nonsense"])
def test_trackers_that_are_not_there(toy: Toy, tmp_path: Path, tracker: str) -> None:
    if tracker == "wandb":
        import importlib.util

        if importlib.util.find_spec("wandb"):
            pytest.skip("wandb is installed")
    with pytest.raises(PastinaError, match=tracker):
        pastina.train(toy(fit={"report_to": [tracker]}), tmp_path / "run")


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("cosine", [0.5, 1.0, 1.0, 0.8535534, 0.5, 0.1464466]),
    ],
)
def test_rates_warm_up_and_fall(schedule: str, shares: list[float]) -> None:
    assert [lr_share(step, 6, 0.3, schedule) for step in range(6)] == pytest.approx(shares)
    assert lr_share(0, 6, 0.0, "linear") == 1


# ---------------------------------------------------------------------------------------------------
# What goes wrong


@pytest.mark.parametrize("what", ["loss", "accuracy on dev"])
def test_numbers_that_explode(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    recipe = toy("regress", fit={"head_lr": 1e25})
    if what != "loss":
        feign_metrics(monkeypatch, [math.nan])
        recipe = toy(fit={"epochs": 1})
    with pytest.raises(PastinaError) as caught:
        pastina.train(recipe, tmp_path / "run")
    text = str(caught.value)
    assert text.startswith(f"The {what} became {'inf' if what == 'loss' else 'nan'} in epoch 1, ")
    assert "Lower fit.lr" in text
    assert text.endswith("No adapter was written.")
    assert not (tmp_path / "run" / "adapter").exists()
    with pytest.raises(PastinaError, match="is not an adapter"):
        pastina.load(tmp_path / "run")


def test_a_folder_that_is_taken(toy: Toy, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    with pytest.raises(RecipeError, match="is not empty"):
        pastina.train(toy(), tmp_path / "run")
    assert (tmp_path / "run" / "thesis.txt").read_text() == "mine"
    with pytest.raises(RecipeError, match="is not empty"):
        pastina.train(toy(), tmp_path / "run" / "thesis.txt")


def test_an_empty_folder_is_free(toy: Toy, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".recipe.toml.x1").touch()  # a run that was killed at once
    assert pastina.train(toy(fit={"epochs": 1}), tmp_path / "run").adapter.is_dir()


@pytest.mark.parametrize(
    ("kind", "sections", "error", "words"),
    [
        ("classify", {"data": {"max_length": 70}}, BackboneError, "max_length = 70, .* at most 66"),
        ("tag", {"head": {"pooling": "cls"}}, RecipeError, "means nothing for a tagger"),
        ("classify", {"fit": {"metric": "rmse"}}, RecipeError, "known: accuracy"),
        ("classify", {"fit": {"class_weights": {"fish": 2}}}, RecipeError, "names 'fish'"),
        ("classify", {"method": {"num_slots": 1}}, PastinaError, "2 special tokens but 1 slots"),
        ("classify", {"method": {"layers": [5]}}, PastinaError, "names layer 5"),
    ],
)
def test_settings_that_do_not_fit(
    toy: Toy,
    tmp_path: Path,
    kind: str,
    sections: dict[str, Any],
    error: type[Exception],
    words: str,
) -> None:
    with pytest.raises(error, match=words):
        pastina.train(toy(kind, **sections), tmp_path / "run")
    assert not (tmp_path / "run").exists(), "nothing half-written remains"


def test_no_pooler_to_pool_by(backbones: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = toy_recipe(backbones("bert-no-pooler"), tmp_path, head={"pooling": "pooler"})
    with pytest.raises(BackboneError, match="no trained pooler"):
        pastina.train(recipe, tmp_path / "run")


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_pooling_goes_with_the_adapter(toy: Toy, tmp_path: Path, pooling: str) -> None:
    run = pastina.train(toy(head={"pooling": pooling}, fit={"epochs": 1}), tmp_path / "run")
    predictor: Any = pastina.load(run.adapter)
    assert predictor.card.pooling == pooling
    assert predictor.engine.reference.model.base_model.model.pooling == pooling


# ---------------------------------------------------------------------------------------------------
# More than one process

SCRIPT = """
import os, pathlib, sys, torch, pastina
torch.set_num_threads(1)
run = pastina.train(pastina.read_recipe(sys.argv[1]), sys.argv[2])
pathlib.Path("score-" + os.environ["RANK"]).write_text(str(run.metrics["rmse"]))
"""


def launched_as(rank: int, world: int, port: int) -> dict[str, str]:
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
    texts = {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"}
    return texts | {name: str(number) for name, number in numbers.items()}


@pytest.mark.enable_socket  # to find a free port
def test_two_processes_train_one_adapter(toy: Toy, tmp_path: Path) -> None:
    from pastina.recipe import recipe_toml

    # one dev row: a process has nothing to score and must not be waited for; without dropout two
    # processes learn what one learns
    recipe = toy(
        "regress",
        rows=45,
        dev_rows=1,
        method={"name": "pasta", "dropout": 0.0},
        head={"dropout": 0.0},
        fit={**FAST, "metric": "rmse", "save_seconds": 0, "precision": "fp32"},
    )
    (tmp_path / "recipe.toml").write_text(recipe_toml(recipe))
    (tmp_path / "script.py").write_text(SCRIPT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [
        subprocess.Popen(
            [sys.executable, "script.py", "recipe.toml", "run"],
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | launched_as(rank, 2, port),  # what torchrun sets
        )
        for rank in (0, 1)
    ]
    try:
        errors = "".join(process.communicate(timeout=200)[1] for process in started)
    finally:
        for process in started:
            process.kill()
    scores = [float(path.read_text()) for path in tmp_path.glob("score-*")]
    if not scores and "gloo" in errors.lower():
        pytest.skip(f"gloo cannot run here: {errors[-300:]}")
    assert [process.returncode for process in started] == [0, 0], errors[-3000:]
    alone = pastina.train(recipe, tmp_path / "alone")
    assert scores == pytest.approx([alone.metrics["rmse"]] * 2, rel=1e-3)
    records = zip(history(tmp_path / "run"), history(alone.folder), strict=True)
    for together, single in records:
        assert together["step"] == single["step"]
        assert together["loss"] == pytest.approx(single["loss"], rel=1e-3)
    assert recipe.data.train is not None
    assert pastina.evaluate(tmp_path / "run", recipe.data.train)["spearman"] > 0.6

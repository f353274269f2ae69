"""Runs with every method: it learns, the backbone stays, the adapter answers; who can hold it."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import pastina
from pastina.adapter import read_card
from pastina.errors import AdapterError, BackboneError, PastinaError, RecipeError
from pastina.files import CONFIG
from pastina.recipe import Recipe, make_recipe, read_recipe
from pastina.training import fit as fit_module
from pastina.training.events import Step
from pastina.training.loop import Stopped
from tests.adapter_folder import reseal
from tests.backbone_folder import TOPICS

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
Toy = Callable[..., Recipe]

# Methods with a rate that suits toy data; the defaults suit real backbones.
METHODS: dict[str, tuple[dict[str, Any], float]] = {
    "lora": ({"name": "lora"}, 1e-2),
    "ia3": ({"name": "ia3"}, 3e-2),
    "ln_tuning": ({"name": "ln_tuning"}, 1e-2),
    "bitfit": ({"name": "bitfit"}, 1e-2),
    "houlsby": ({"name": "bottleneck", "style": "houlsby", "reduction": 4}, 1e-2),
    "pfeiffer": ({"name": "bottleneck", "reduction": 4}, 1e-2),
    "parallel": ({"name": "bottleneck", "style": "parallel", "reduction": 4}, 1e-2),
    "prefix_tuning": ({"name": "prefix_tuning", "num_virtual_tokens": 5, "inner_size": 32}, 1e-2),
    "p_tuning_v2": ({"name": "p_tuning_v2", "num_virtual_tokens": 5}, 1e-1),
    "prompt_tuning": ({"name": "prompt_tuning", "num_virtual_tokens": 5}, 1e-1),
    "trainable_tokens": ({"name": "trainable_tokens"}, 1e-1),
    "vera": (
        {"name": "peft", "type": "VERA", "config": {"r": 16, "target_modules": ["query", "value"]}},
        1e-1,
    ),
}
every_method = pytest.mark.parametrize("case", METHODS)


def recipe_of(toy: Toy, case: str, kind: str = "classify", **sections: Any) -> Recipe:
    method, lr = METHODS[case]
    fit = {"epochs": 6, "lr": lr, "head_lr": 5e-2} | sections.pop("fit", {})
    return toy(kind, rows=48, dev_rows=20, method=method, fit=fit, **sections)


def texts() -> list[str]:
    return ["please send pear", "please send drill", "we need the plum now", "a saw"]


@every_method
def test_it_learns_and_answers_the_same_when_loaded(
    toy: Toy, tmp_path: Path, bert: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[Any] = []
    save = fit_module.save_adapter
    monkeypatch.setattr(
        fit_module, "save_adapter", lambda model, *args: models.append(model) or save(model, *args)
    )
    run = pastina.train(recipe_of(toy, case, head={"pooling": "mean"}), tmp_path / "run")
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert losses[-1] < 0.7 * losses[0]
    assert run.metrics["accuracy"] >= 0.8

    backbone = models[0].get_base_model().backbone.state_dict()
    frozen = {key.replace("base_layer.", ""): value for key, value in backbone.items()}
    stored = load_file(bert / "model.safetensors")
    assert all(
        torch.equal(frozen[name], tensor) for name, tensor in stored.items() if "pooler" not in name
    )

    task = pastina.load(run.adapter)
    assert task.engine.name.startswith("reference")
    assert [answer.label for answer in task.predict(texts())] == [*TOPICS, *TOPICS]
    assert pastina.evaluate(run.adapter)["accuracy"] == run.metrics["accuracy"]
    card = read_card(run.adapter)
    assert card.method == METHODS[case][0]["name"]
    assert make_recipe(card.recipe).method == recipe_of(toy, case).method


@pytest.mark.parametrize("kind", ["tag", "pair", "regress"])
@pytest.mark.parametrize("case", ["lora", "bitfit", "prompt_tuning", "p_tuning_v2"])
def test_other_kinds(toy: Toy, tmp_path: Path, case: str, kind: str) -> None:
    run = pastina.train(recipe_of(toy, case, kind, fit={"epochs": 8}), tmp_path / "run")
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert losses[-1] < 0.8 * losses[0]
    assert pastina.evaluate(run.adapter)[run.metric] == pytest.approx(run.metrics[run.metric])


@every_method
def test_a_run_that_was_stopped_ends_as_one_that_was_not(
    toy: Toy, tmp_path: Path, case: str
) -> None:
    recipe = recipe_of(toy, case, fit={"epochs": 2, "save_seconds": 0})
    whole = pastina.train(recipe, tmp_path / "whole")

    def interrupt(event: Any) -> None:
        if isinstance(event, Step) and event.step == 4:
            raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, Stopped)):
        pastina.train(recipe, tmp_path / "halted", on_event=interrupt)
    again = pastina.train(recipe, tmp_path / "halted", resume=True)
    for name in ("adapter_model.safetensors", CONFIG):
        assert (again.adapter / name).read_bytes() == (whole.adapter / name).read_bytes(), name


@pytest.mark.parametrize("case", ["lora", "parallel", "prompt_tuning", "p_tuning_v2", "ia3"])
def test_bf16_runs_and_int8_is_refused(toy: Toy, tmp_path: Path, case: str) -> None:
    run = pastina.train(
        recipe_of(toy, case, fit={"epochs": 2, "precision": "bf16"}), tmp_path / "run"
    )
    assert json.loads((run.folder / "result.json").read_text())["engine"] == "reference, bf16"
    tensors = load_file(run.adapter / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    with pytest.raises(RecipeError, match="no int8"):
        pastina.train(recipe_of(toy, case, fit={"precision": "int8"}), tmp_path / "other")


# --- fleets and banks -----------------------------------------------------------------------------


def test_a_fleet_of_methods_ends_as_they_do_alone(toy: Toy, tmp_path: Path) -> None:
    cases = ["lora", "bitfit", "ln_tuning", "parallel", "prompt_tuning", "trainable_tokens"]
    recipes = [recipe_of(toy, case, fit={"epochs": 1}, head={"pooling": "cls"}) for case in cases]
    recipes.append(toy(rows=48, dev_rows=20, fit={"epochs": 1}, head={"pooling": "cls"}))
    together = pastina.train_fleet(recipes, [tmp_path / f"fleet{i}" for i in range(len(recipes))])
    for i, (recipe, run) in enumerate(zip(recipes, together, strict=True)):
        assert isinstance(run, pastina.Run), run
        alone = pastina.train(recipe, tmp_path / f"alone{i}")
        one, other = (
            load_file(folder / "adapter_model.safetensors")
            for folder in (run.adapter, alone.adapter)
        )
        assert one.keys() == other.keys()
        for key, tensor in one.items():
            torch.testing.assert_close(tensor, other[key], rtol=0, atol=1e-5)
        assert run.trained_parameters == alone.trained_parameters


@pytest.mark.parametrize(("method", "words"), [("full", "full fine-tuning"), ("peft", "only PEFT")])
def test_what_a_fleet_cannot_hold(toy: Toy, tmp_path: Path, method: str, words: str) -> None:
    values = {"name": method} | ({"type": "VERA"} if method == "peft" else {})
    with pytest.raises(RecipeError, match=words):
        pastina.train_fleet([toy(method=values)], [tmp_path / "run"])


def test_a_bank_says_what_it_cannot_hold(toy: Toy, tmp_path: Path, bert: Path) -> None:
    run = pastina.train(recipe_of(toy, "lora", fit={"epochs": 1}), tmp_path / "run")
    tasks = pastina.Tasks(str(bert))
    with pytest.raises(AdapterError, match=r"'lora', which works inside the backbone.*alone"):
        tasks.add(run.adapter)


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ({"type": "VERRA"}, "no 'VERRA'. Did you mean 'VERA'?"),
        ({"type": "xyz"}, "PEFT has no 'xyz'. It has "),
        ({"type": "ADALORA"}, "changes its ranks"),
        ({"type": "POLY"}, "number of a task"),
        ({"type": "PASTA"}, "Write method.name = 'pasta'"),
        ({"type": "VERA", "config": {"rr": 4}}, "VeraConfig has no 'rr'. Did you mean 'r'?"),
        ({"type": "VERA", "config": {"task_type": "SEQ_CLS"}}, "set by pastina itself"),
        ({"type": "VERA", "config": {"target_modules": ["nothing"]}}, "cannot be put on BertModel"),
        ({"type": "VERA", "config": {"target_modules": ["nothing"]}}, "Correct method.config, or"),
        ({"type": "LOHA", "config": {"r": -1, "target_modules": ["query"]}}, "cannot be put on"),
        ({"type": "LORA", "config": {"init_lora_weights": "pissa"}}, "changes the backbone's own"),
        ({"type": "SHADOW", "config": {"target_modules": ["query"]}}, "knows decoders only"),
        ({"type": "PROMPT_TUNING"}, "method.config.num_virtual_tokens: 'PROMPT_TUNING' needs it"),
    ],
)
def test_a_peft_method_that_does_not_fit(
    toy: Toy, tmp_path: Path, method: dict[str, Any], words: str
) -> None:
    recipe = toy(method={"name": "peft", **method}, fit={"epochs": 1})
    with pytest.raises(PastinaError) as caught:
        pastina.train(recipe, tmp_path / "run")
    assert words in str(caught.value)


def test_learned_tokens_need_room(toy: Toy, tmp_path: Path) -> None:
    method = {"name": "prompt_tuning", "num_virtual_tokens": 40}
    with pytest.raises(BackboneError, match=r"32 behind 40 learned ones, but .* at most 66"):
        pastina.train(toy(method=method), tmp_path / "run")


def test_an_adapter_of_another_method_than_its_card_says(toy: Toy, tmp_path: Path) -> None:
    run = pastina.train(recipe_of(toy, "bitfit", fit={"epochs": 1}), tmp_path / "run")
    reseal(run.adapter, method="lora")
    with pytest.raises(AdapterError, match=r"trained with 'lora', .* 'BITFIT'"):
        pastina.load(run.adapter)


@pytest.mark.parametrize("case", ["lora", "bitfit", "p_tuning_v2", "trainable_tokens"])
def test_a_missing_tensor_is_noticed(toy: Toy, tmp_path: Path, case: str) -> None:
    from safetensors.torch import save_file

    run = pastina.train(recipe_of(toy, case, fit={"epochs": 1}), tmp_path / "run")
    path = run.adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    first = next(name for name in tensors if "classifier" not in name)
    del tensors[first]
    save_file(tensors, path)
    reseal(run.adapter)
    with pytest.raises(AdapterError):
        pastina.load(run.adapter)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["method=lora", "method.r=0"], "method.r"),
        (["method=lora", "method.rank=4"], "unknown key 'method.rank'"),
        (["method=lora", 'method.parts=["query", "vlaue"]'], "method.parts"),
        (["method=bottleneck", "method.style=houlsbi"], "method.style"),
        (["method=bitfit", "method.biases=some"], "method.biases"),
        (["method=peft"], "method.type: Field required"),
        (["method=prefix"], "did you mean 'prefix_tuning'"),
        (["method=p_tuning_v2", "method.num_virtual_tokens=0"], "num_virtual_tokens"),
    ],
)
def test_options_are_checked(overrides: list[str], words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read_recipe(None, overrides)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (
            {"name": "lora", "targets": ".*nothing"},
            "fits the whole name of no module. Names are such",
        ),
        ({"name": "lora", "targets": "("}, "is not a pattern"),
        ({"name": "ia3", "targets": ".*key", "feedforward": "output"}, "method.feedforward"),
        (
            {"name": "ia3", "targets": ".*key", "feedforward": r".*output\.dense"},
            "which method.targets does not",
        ),
        ({"name": "lora", "targets": r".*LayerNorm"}, "cannot be put on"),
        ({"name": "bottleneck", "reduction": 1000}, "leaves nothing of a layer of 32"),
        ({"name": "trainable_tokens", "special_token_ids": [99999]}, "99999"),
        ({"name": "trainable_tokens", "special_token_ids": [-1]}, "-1"),
        ({"name": "trainable_tokens", "special_token_ids": [2, 2]}, "2"),
    ],
)
def test_settings_that_do_not_fit_the_model(
    toy: Toy, tmp_path: Path, method: dict[str, Any], words: str
) -> None:
    with pytest.raises(PastinaError) as caught:
        pastina.train(toy(method=method, fit={"epochs": 1}), tmp_path / "run")
    assert words in str(caught.value)


def test_half_a_pattern_of_ia3(toy: Toy, tmp_path: Path) -> None:
    recipe = toy(method={"name": "ia3", "targets": ".*key"})
    with pytest.raises(RecipeError, match="go together"):
        pastina.train(recipe, tmp_path / "run")
    patterns = {"targets": r".*\.(key|output\.dense)", "feedforward": r".*\.output\.dense"}
    run = pastina.train(
        toy(method={"name": "ia3", **patterns}, fit={"epochs": 1}), tmp_path / "own"
    )
    assert run.trained_parameters == 2 * (32 + 32 + 48) + 66  # with the output of the attention


def test_every_option_has_a_default_or_is_required() -> None:
    from pastina.methods import METHODS

    for method in METHODS.values():
        assert dataclasses.is_dataclass(method)
        required = [n for n, f in method.options.model_fields.items() if f.is_required()]
        assert set(method.defaults) | set(required) | {"name"} == set(method.options.model_fields)

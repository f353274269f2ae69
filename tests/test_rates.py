"""How fast each number learns: by layer, by slot, for the vector of every token."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import pastina
from pastina.errors import RecipeError
from pastina.methods import attach
from pastina.recipe import Recipe, make_recipe
from pastina.training.events import Event, Step
from pastina.training.fit import Run
from pastina.training.fleet import train_fleet
from pastina.training.rates import RowAdamW, lr_share, make_optimizer
from tests.adapter_folder import family_folder
from tests.backbone_folder import toy_recipe
from tests.models import CLS, SEP, task

Toy = Callable[..., Recipe]
FAST: dict[str, Any] = {"lr": 3e-2, "head_lr": 1e-1, "batch": 8, "precision": "fp32"}
EVERYWHERE: dict[str, Any] = {"name": "pasta", "everywhere": True}


def optimizer_of(method: Any, **fit: Any) -> tuple[dict[str, torch.nn.Parameter], RowAdamW]:
    recipe = make_recipe({"method": method, "fit": fit}).resolved()
    model: Any = attach(
        task(),
        recipe.method,
        special_token_ids=(CLS, SEP),
        num_slots=2,
        modules_to_save=["classifier"],
    )
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return trained, make_optimizer(trained, recipe, model.get_base_model().bert)


def rates(method: Any, **fit: Any) -> dict[str, float]:
    trained, optimizer = optimizer_of(method, **fit)
    of = {id(p): g["base_lr"] for g in optimizer.param_groups for p in g["params"]}
    return {name: of[id(p)] for name, p in trained.items()}


def shares(method: Any, **fit: Any) -> dict[str, Any]:
    trained, optimizer = optimizer_of(method, **fit)
    of = {id(p): g["shares"] for g in optimizer.param_groups for p in g["params"]}
    return {name: pytest.approx(of[id(p)]) for name, p in trained.items()}


def test_the_rate_over_the_steps() -> None:
    assert [lr_share(step, 4, 0.0, "cosine") for step in (0, 2)] == pytest.approx([1.0, 0.5])
    assert {lr_share(step, 4, 0.0, "constant") for step in range(4)} == {1.0}


def test_rates_by_layer() -> None:
    found = rates({"name": "pasta"}, lr=0.1, head_lr=0.5, layer_decay=0.5)
    assert len(found) == 5
    for name, lr in found.items():
        depth = next((2 - i for i in range(3) if f"layer.{i}.pasta" in name), None)
        assert lr == pytest.approx(0.5 if depth is None else 0.1 * 0.5**depth)
    full = rates({"name": "full"}, lr=0.1, head_lr=0.5, layer_decay=0.5)
    assert {round(lr, 6) for n, lr in full.items() if "embeddings" in n} == {0.0125}
    assert {round(lr, 6) for n, lr in full.items() if "layer.2." in n} == {0.1}
    assert {round(lr, 6) for n, lr in full.items() if "pooler" in n} <= {0.1}


def test_a_rate_for_each_layer() -> None:
    found = rates({"name": "pasta"}, lr=0.1, head_lr=0.5, layer_rates=[0.5, 1.0, 3.0])
    for name, lr in found.items():
        layer = next((i for i in range(3) if f"layer.{i}.pasta" in name), None)
        assert lr == pytest.approx(0.5 if layer is None else 0.1 * (0.5, 1.0, 3.0)[layer])
    full = rates({"name": "full"}, lr=0.1, head_lr=0.5, layer_rates=[0.5, 1.0, 3.0])
    assert {round(lr, 6) for n, lr in full.items() if "embeddings" in n} == {0.1}
    assert {round(lr, 6) for n, lr in full.items() if "layer.0." in n} == {0.05}


def test_rates_by_layer_where_there_are_none(toy: Toy, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="means nothing for linear"):
        pastina.train(toy(method={"name": "linear"}, fit={"layer_decay": 0.9}), tmp_path / "run")
    albert = family_folder("albert", tmp_path / "albert")
    for fit in ({"layer_decay": 0.9}, {"layer_rates": [1.0, 1.0]}):
        with pytest.raises(RecipeError, match="calls one several times"):
            pastina.train(toy_recipe(albert, tmp_path, fit=fit), tmp_path / "run")


def test_a_rate_for_each_vector() -> None:
    head = {"classifier"}
    for method, wanted in (
        (EVERYWHERE, (1.0, 1.0, 0.1)),
        (EVERYWHERE | {"share": "all"}, (1.0, 0.1)),
        (EVERYWHERE | {"scale": True}, (1.0, 1.0, 0.1)),
    ):
        found = shares(method, lr=0.1, everywhere_lr=0.01)
        assert len(found) > 3
        for name, own in found.items():
            assert own == (() if head & set(name.split(".")) else wanted), name
    for name, own in shares(EVERYWHERE, lr=0.1, slot_rates=[0.5, 2.0]).items():
        assert own == (() if head & set(name.split(".")) else (0.5, 2.0, 1.0)), name
    assert all(own == () for own in shares({"name": "pasta"}, lr=0.1).values())


def test_a_rate_for_products() -> None:
    found = rates(EVERYWHERE | {"rank": 2}, lr=0.1, head_lr=0.5, rank_lr=0.02, layer_decay=0.5)
    products = {
        name: lr for name, lr in found.items() if "pasta_downs" in name or "pasta_ups" in name
    }
    assert len(products) == 6
    for name, lr in products.items():
        assert lr == pytest.approx(
            0.02 * 0.5 ** next(2 - i for i in range(3) if f"layer.{i}." in name)
        )
    assert {lr for name, lr in found.items() if "classifier" in name} == {0.5}
    assert max(lr for name, lr in found.items() if "pasta_vectors" in name) == 0.1


def test_a_share_of_the_rate_is_a_rate() -> None:
    """Rows with a share of the rate go as tensors of their own with that rate, decay included."""
    start, grads = torch.randn(3, 4), torch.randn(6, 3, 4)
    whole = torch.nn.Parameter(start.clone())
    rows = [torch.nn.Parameter(row.clone()) for row in start]
    own = (1.0, 0.25, 3.0)
    group = {"lr": 0.1, "weight_decay": 0.3}
    together = RowAdamW([{"params": [whole], "shares": own, **group}])
    apart = [
        torch.optim.AdamW([row], lr=0.1 * share, weight_decay=0.3)
        for row, share in zip(rows, own, strict=True)
    ]
    for grad in grads:
        whole.grad = grad.clone()
        together.step()
        for row, part, optimizer in zip(rows, grad, apart, strict=True):
            row.grad = part.clone()
            optimizer.step()
    torch.testing.assert_close(whole.detach(), torch.stack([r.detach() for r in rows]))


@pytest.mark.parametrize(
    ("method", "fit", "complaint"),
    [
        ({"name": "pasta"}, {"everywhere_lr": 0.1}, "method.everywhere, which is not set"),
        ({"name": "lora"}, {"everywhere_lr": 0.1}, "method.everywhere, which is not set"),
        ({"name": "linear"}, {"slot_rates": [1.0]}, "slot_rates means nothing for linear"),
        ({"name": "pasta"}, {"slot_rates": [1.0]}, "names 1 rates, but a layer has 2 vectors"),
        ({"name": "pasta"}, {"rank_lr": 0.1}, "method.rank, which is not set"),
        (EVERYWHERE, {"slot_rates": [1.0] * 3}, "names 3 rates, but a layer has 2 vectors"),
        ({"name": "pasta"}, {"layer_rates": [1.0]}, "names 1 rates, but the backbone has 3 layers"),
        ({"name": "pasta"}, {"layer_rates": [1.0] * 3, "layer_decay": 0.9}, "leave one out"),
        ({"name": "linear"}, {"layer_rates": [1.0] * 3}, "means nothing for linear"),
    ],
)
def test_rates_that_mean_nothing(method: Any, fit: Any, complaint: str) -> None:
    with pytest.raises(RecipeError, match=complaint):
        optimizer_of(method, **fit)


@pytest.mark.parametrize(
    "fit", [{"everywhere_lr": 0.0}, {"slot_rates": [-1.0]}, {"layer_rates": 2}]
)
def test_rates_that_are_none(fit: Any) -> None:
    with pytest.raises(RecipeError, match=r"fit\.(everywhere_lr|slot_rates|layer_rates)"):
        make_recipe({"method": EVERYWHERE, "fit": fit})


def test_rates_resumed_and_in_a_fleet(toy: Toy, tmp_path: Path) -> None:
    """A run that was broken off ends with the same bytes; a member of a fleet as if alone."""
    own = {"everywhere_lr": 1e-3, "slot_rates": [0.5, 2.0], "layer_rates": [1.0, 0.3]}
    fit = FAST | own | {"rank_lr": 1e-2, "save_seconds": 0, "epochs": 2}
    recipe = toy("tag", rows=24, dev_rows=10, method=EVERYWHERE | {"rank": 2}, fit=fit)
    straight = pastina.train(recipe, tmp_path / "straight")

    def breaks(event: Event) -> None:
        if isinstance(event, Step) and event.step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pastina.train(recipe, tmp_path / "broken", on_event=breaks)
    resumed = pastina.train(recipe, tmp_path / "broken", resume=True)
    wanted = load_file(straight.adapter / "adapter_model.safetensors")
    found = load_file(resumed.adapter / "adapter_model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())

    plain = toy("tag", rows=24, dev_rows=10, method=EVERYWHERE, fit=FAST | {"epochs": 2})
    members = train_fleet([recipe, plain], [tmp_path / "a", tmp_path / "b"])
    assert all(isinstance(run, Run) for run in members), members
    joined = load_file(tmp_path / "a" / "adapter" / "adapter_model.safetensors")
    other = load_file(tmp_path / "b" / "adapter" / "adapter_model.safetensors")
    for name, tensor in wanted.items():
        torch.testing.assert_close(joined[name], tensor, atol=1e-5, rtol=1e-4)
    vectors = [name for name in wanted if "pasta_vectors" in name]
    # what starts at 0 and learns at a thirtieth of the rate has gone less far
    assert all(wanted[n][-1].norm() < other[n][-1].norm() for n in vectors)

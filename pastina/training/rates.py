"""How fast each number learns: the optimiser's groups, and how their rates go over the steps."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from pastina.errors import RecipeError
from pastina.methods.layers import Layers, find_layers
from pastina.recipe import PastaOptions, Recipe


def lr_share(step: int, total: int, warmup: float, schedule: str) -> float:
    """Which share of its full rate the optimiser takes at this step (from 0).

    >>> [round(lr_share(step, 4, 0.25, "linear"), 2) for step in range(4)]
    [1.0, 1.0, 0.67, 0.33]
    """
    warm = round(warmup * total)
    if step < warm:
        return (step + 1) / warm
    if schedule == "constant":
        return 1.0
    left = (total - step) / max(total - warm, 1)
    return (1 - math.cos(math.pi * left)) / 2 if schedule == "cosine" else left


class RowAdamW(torch.optim.AdamW):
    """AdamW whose groups may name a share of their rate for each row of a tensor (`shares`).

    AdamW's step is its rate times a direction that does not depend on it, so a share of the step is a
    step at a share of the rate.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step of all parameters that have a gradient."""
        shared = [
            (p, g["shares"]) for g in self.param_groups if g.get("shares") for p in g["params"]
        ]
        before = [parameter.clone() for parameter, _ in shared]
        loss = super().step(closure)
        for (parameter, shares), old in zip(shared, before, strict=True):
            share_V1 = parameter.new_tensor(shares).unsqueeze(-1)
            parameter.sub_(old).mul_(share_V1).add_(old)
        return loss


def make_optimizer(
    trained: Mapping[str, torch.nn.Parameter], recipe: Recipe, backbone: Any
) -> RowAdamW:
    """AdamW with one rate for what learns in the backbone, by layer and vector where asked, and one for
    the head.

    Raises:
        RecipeError: rates by layer where no layer learns, where one layer stands for several, or for
            another number of layers; rates by vector without such vectors, or for another number.
    """
    fit = recipe.fit
    by_layer = _layer_shares(trained, recipe, backbone)
    by_row = _row_shares(trained, recipe)
    if fit.rank_lr is not None and not any(map(_is_product, trained)):
        raise RecipeError(
            f"fit.rank_lr = {fit.rank_lr} is the rate of the products of method.rank, which is not set. "
            "Set it, or leave the rate out."
        )
    if fit.bias_lr is not None and not any(map(_is_bias, trained)):
        raise RecipeError(
            f"fit.bias_lr = {fit.bias_lr} is the rate of the biases of method.bias_layers, which is not "
            "set. Set it, or leave the rate out."
        )
    is_cpu = all(parameter.device.type == "cpu" for parameter in trained.values())
    groups: dict[tuple[float, float, tuple[float, ...]], list[torch.nn.Parameter]] = {}
    for name, parameter in trained.items():
        lr = fit.head_lr if _is_head(name) else fit.lr
        if fit.rank_lr is not None and _is_product(name):
            lr = fit.rank_lr
        if fit.bias_lr is not None and _is_bias(name):
            lr = fit.bias_lr
        assert lr is not None, "the recipe is resolved"
        lr *= by_layer.get(name, 1.0)
        is_matrix = (
            sum(size > 1 for size in parameter.shape) > 1
        )  # (IA)3 writes scales as (size, 1)
        decay = fit.weight_decay if is_matrix and not _is_bias(name) else 0.0
        groups.setdefault((lr, decay, by_row.get(name, ())), []).append(parameter)
    return RowAdamW(
        [
            {"params": members, "lr": lr, "base_lr": lr, "weight_decay": decay, "shares": shares}
            for (lr, decay, shares), members in groups.items()
        ],
        eps=fit.adam_eps,
        fused=is_cpu or None,  # PyTorch's loop over parameters takes six times as long there
    )


def _is_product(name: str) -> bool:
    return ".pasta_downs." in name or ".pasta_ups." in name


def _is_bias(name: str) -> bool:
    return ".pasta_biases." in name


def _is_head(name: str) -> bool:
    return ".classifier." in f".{name}"


def _row_shares(
    trained: Mapping[str, torch.nn.Parameter], recipe: Recipe
) -> dict[str, tuple[float, ...]]:
    """For each table of vectors the share of its rate that each row learns at, where that matters."""
    fit, method = recipe.fit, recipe.method
    if fit.slot_rates is None and fit.everywhere_lr is None:
        return {}
    is_everywhere = isinstance(method, PastaOptions) and method.everywhere
    if fit.everywhere_lr is not None and not is_everywhere:
        raise RecipeError(
            f"fit.everywhere_lr = {fit.everywhere_lr} is the rate of the vectors of "
            "method.everywhere, which is not set. Set it, or leave the rate out."
        )
    tables = {n: p for n, p in trained.items() if ".pasta_vectors" in n or ".pasta_scales" in n}
    if not tables:
        raise RecipeError(
            f"fit.slot_rates means nothing for {method.name}: it has no vectors for slots. Leave it out."
        )
    num_own = next(iter(tables.values())).shape[-2] - is_everywhere
    own = fit.slot_rates or (1.0,) * num_own
    if len(own) != num_own:
        raise RecipeError(
            f"fit.slot_rates names {len(own)} rates, but a layer has {num_own} vectors for slots. Name "
            "one for each."
        )
    assert fit.lr is not None, "the recipe is resolved"
    last = ((fit.everywhere_lr or fit.lr) / fit.lr,) * is_everywhere
    return dict.fromkeys(tables, (*own, *last))


def _layer_shares(names: Iterable[str], recipe: Recipe, backbone: Any) -> dict[str, float]:
    """The share of fit.lr for each parameter of the backbone, where that depends on its layer."""
    fit = recipe.fit
    if fit.layer_decay == 1 and fit.layer_rates is None:
        return {}
    if fit.layer_decay != 1 and fit.layer_rates is not None:
        raise RecipeError(
            "fit.layer_decay and fit.layer_rates both say how fast a layer learns; leave one out."
        )
    what = f"fit.layer_decay = {fit.layer_decay}" if fit.layer_rates is None else "fit.layer_rates"
    layers = find_layers(backbone)
    if any(len(calls) > 1 for calls in layers.indexes):
        raise RecipeError(
            f"{what} needs layers of their own, and {recipe.backbone.name} calls one several times. "
            "Leave it out."
        )
    if fit.layer_rates is not None and len(fit.layer_rates) != layers.num_layers:
        raise RecipeError(
            f"fit.layer_rates names {len(fit.layer_rates)} rates, but the backbone has "
            f"{layers.num_layers} layers. Name one for each, from below."
        )
    depths = {n: depth for n in names if (depth := _depth(n, layers)) is not None}
    if not any(depth < layers.num_layers for depth in depths.values()):
        raise RecipeError(
            f"{what} means nothing for {recipe.method.name}: nothing in the layers learns. Leave it out."
        )
    if fit.layer_rates is None:
        return {name: fit.layer_decay**depth for name, depth in depths.items()}
    from_top = (*reversed(fit.layer_rates), 1.0)  # embeddings learn at fit.lr
    return {name: from_top[depth] for name, depth in depths.items()}


def _depth(name: str, layers: Layers) -> int | None:
    """How many layers stand above a parameter of the backbone; None: that means nothing for it."""
    if _is_head(name):
        return None
    for index, layer in enumerate(layers.names):
        if f".{layer}." in f".{name}":
            return layers.num_layers - 1 - index
    return layers.num_layers if "embed" in name else None

"""How fast each number learns: the optimiser's groups, and how their rates go over the steps."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from pastina.errors import RecipeError
from pastina.methods.layers import Layers, find_layers
from pastina.recipe import Recipe


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


def make_optimizer(
    trained: Mapping[str, torch.nn.Parameter], recipe: Recipe, backbone: Any
) -> torch.optim.AdamW:
    """AdamW with one rate for what learns in the backbone, by layer where asked, and one for the head.

    Raises:
        RecipeError: fit.layer_decay where no layer learns, or where one layer stands for several.
    """
    fit = recipe.fit
    depth = _depths(trained, recipe, backbone)
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in trained.items():
        lr = fit.head_lr if _is_head(name) else fit.lr
        assert lr is not None, "the recipe is resolved"
        lr *= fit.layer_decay ** depth.get(name, 0)
        is_matrix = (
            sum(size > 1 for size in parameter.shape) > 1
        )  # (IA)3 writes scales as (size, 1)
        decay = fit.weight_decay if is_matrix else 0.0
        groups.setdefault((lr, decay), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": members, "lr": lr, "base_lr": lr, "weight_decay": decay}
            for (lr, decay), members in groups.items()
        ],
        eps=fit.adam_eps,
    )


def _is_head(name: str) -> bool:
    return ".classifier." in f".{name}"


def _depths(names: Iterable[str], recipe: Recipe, backbone: Any) -> dict[str, int]:
    """How many layers stand above each parameter of the backbone, where that matters."""
    if recipe.fit.layer_decay == 1:
        return {}
    layers = find_layers(backbone)
    if any(len(calls) > 1 for calls in layers.indexes):
        raise RecipeError(
            f"fit.layer_decay = {recipe.fit.layer_decay} needs layers of their own, and "
            f"{recipe.backbone.name} calls one several times. Leave it out."
        )
    found = {n: depth for n in names if (depth := _depth(n, layers)) is not None}
    if not any(depth < layers.num_layers for depth in found.values()):
        raise RecipeError(
            f"fit.layer_decay = {recipe.fit.layer_decay} means nothing for {recipe.method.name}: "
            "nothing in the layers learns. Leave it out."
        )
    return found


def _depth(name: str, layers: Layers) -> int | None:
    if _is_head(name):
        return None
    for index, layer in enumerate(layers.names):
        if f".{layer}." in f".{name}":
            return layers.num_layers - 1 - index
    return layers.num_layers if "embed" in name else None

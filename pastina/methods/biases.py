"""The biases of a backbone: which modules have one, and which of a layer's PASTA lets learn.

Shape letters: B rows, T tokens, N of the rows, D numbers of all parts of a layer.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from pastina.errors import BackboneError
from pastina.methods._peft import Anything

# Classes that add their bias last, and to which dimension of the output from the end.
CHANNEL = {nn.Linear: 1, nn.LayerNorm: 1, nn.Conv1d: 2, nn.Conv2d: 3}
_KEYS = ("key", "k_lin", "k_proj", "k")  # of a plain attention
_OF_PLACES = ("query_proj", "key_proj")  # DeBERTa's, which project places for all rows as well


class BiasPart(NamedTuple):
    """A module of a layer that adds a bias, and where its own numbers are among those of the layer."""

    module: nn.Module
    place: slice


def has_bias(name: str, module: nn.Module) -> bool:
    """Whether a module adds a bias of its own.

    Raises:
        BackboneError: it has one, of which it is not known what it does.
    """
    plain = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    own = [key for key, _ in plain.named_parameters(recurse=False) if key.endswith("bias")]
    if own and (own != ["bias"] or type(plain) not in CHANNEL):
        raise BackboneError(
            f"{name!r} is a {type(plain).__name__} with {own[0]}, of which it is not known what it "
            "does. Name the modules by target_modules, or choose another method."
        )
    return bool(own)


def bias_parts(layer: nn.Module, layer_name: str = "layer") -> list[BiasPart]:
    """The parts of a layer whose biases learn, in order: its products and norms, but not the keys.

    A bias of the keys adds the same to all scores of a query, which the softmax forgets (not so where
    positions turn the keys). Where places have queries and keys too, theirs are the same for all rows:
    queries are left out as well.

    Raises:
        BackboneError: there is none, or one of which it is not known what it does.
    """
    parts: list[BiasPart] = []
    start = 0
    for name, module in layer.named_modules():
        if "base_layer" in name.split(".") or name.rpartition(".")[2] in (*_KEYS, *_OF_PLACES):
            continue
        if not has_bias(f"{layer_name}.{name}", module):
            continue
        inner: Anything = module
        plain = inner.get_base_layer() if isinstance(module, BaseTunerLayer) else inner
        if CHANNEL[type(plain)] != 1:
            raise BackboneError(
                f"bias_layers means the biases of products and norms; seen a {type(plain).__name__} in "
                f"{layer_name!r}. Leave it out."
            )
        parts.append(BiasPart(inner, slice(start, start := start + len(plain.bias))))
    if not parts:
        raise BackboneError(
            f"bias_layers needs layers with biases; {layer_name!r} ({type(layer).__name__}) has none. "
            "Leave it out."
        )
    return parts


def num_biases(parts: Sequence[BiasPart]) -> int:
    """D."""
    return parts[-1].place.stop


def shifted(
    output: Tensor, rows_N: Tensor | None, values: Tensor, num_rows: int | None = None
) -> Tensor:
    """What a part put out, (B, ..., size), plus its own values in some rows (None: in all).

    Raises:
        BackboneError: what was put out has not `num_rows` rows.
    """
    values = values.to(output.dtype)
    if rows_N is None:
        return output + values
    if len(output) != num_rows:
        raise BackboneError(
            f"A part of a layer put out {len(output)} rows for {num_rows} in the batch, so a row cannot "
            "have biases of its own. Use one adapter for the whole batch."
        )
    return output.index_add(0, rows_N, values.expand(len(rows_N), *output.shape[1:]))


def pad_to_rows(values: Tensor, num_rows: int, width: int) -> Tensor:
    """Numbers (..., D) as so many rows of this width each, filled up with zeros."""
    filled = torch.nn.functional.pad(values, (0, num_rows * width - values.shape[-1]))
    return filled.reshape(-1, width)

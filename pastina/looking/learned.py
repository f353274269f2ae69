"""What a PASTA adapter has learned, beside the states that it changes.

Shape letters: L layers that have vectors, V vectors of a layer, D hidden, R rank, T tokens, N places
that get a vector.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pastina.looking.places import Places, chosen, with_vectors
from pastina.looking.records import Vectors
from pastina.looking.trace import Trace
from pastina.methods.pasta import PastaConfig, PastaLayer
from pastina.methods.placement import Frame
from pastina.methods.rules import SlotRule

_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Learned:
    """What one layer has: its rule, and its numbers; None where the variant has none."""

    rule: SlotRule
    vector_VD: Tensor
    scale_VD: Tensor | None
    down_DR: Tensor | None
    up_RD: Tensor | None
    bias_norm: float = math.nan  # of what is added to the biases
    own_bias_norm: float = math.nan  # of the backbone's


def learned_numbers(model: Any) -> dict[int, Learned]:
    """Of each layer that has some. model: a PeftModel with the adapter "default"."""
    found: dict[int, Learned] = {}
    for module in model.modules():
        if not isinstance(module, PastaLayer) or "default" not in module.pasta_vectors:
            continue
        tables = [
            getattr(module, name)["default"].detach().float().cpu()
            if "default" in getattr(module, name)
            else None
            for name in ("pasta_vectors", "pasta_scales", "pasta_downs", "pasta_ups")
        ]
        is_shared = len(module.indexes) > 1
        for call, row in module.pasta_rows["default"].items():
            own = [t[row] if is_shared and t is not None else t for t in tables]
            norms: tuple[float, ...] = ()
            if call in module.pasta_bias_rows["default"]:
                frozen = torch.cat([part.module.bias.flatten() for part in module.bias_parts])  # type: ignore[operator]
                norms = float(module.biases_of("default", call).norm()), float(frozen.norm())
            rule = module.pasta_rule["default"][call]
            found[module.indexes[call]] = Learned(rule, *own, *norms)  # type: ignore[arg-type]
    return dict(sorted(found.items()))


class LearnedStates:
    """The states that a PASTA adapter changes, summed over the texts.

    V counts the vectors of all layers, as not every layer need have the same ones; behind those of the
    slots there is the one for every token.
    """

    def __init__(self, model: Any) -> None:
        self._config: PastaConfig = model.peft_config["default"]
        self._learned = learned_numbers(model)
        self._columns = {layer: _columns(own.rule) for layer, own in self._learned.items()}
        self._all = sorted({c for columns in self._columns.values() for c in columns})
        own = next(iter(self._learned.values()))
        shape = len(self._learned), len(self._all)
        self._state_LVD = torch.zeros(*shape, own.vector_VD.shape[-1])
        self._length_LV, self._scaled_LV, self._count_LV = (torch.zeros(shape) for _ in range(3))
        self._all_length_L, self._product_L = (torch.zeros(shape[0]) for _ in range(2))

    def add(self, trace: Trace, input_ids_BT: Tensor) -> None:
        """Take in one text."""
        frame = Frame(input_ids_BT.cpu(), None)
        for at, (layer, own) in enumerate(self._learned.items()):
            state_TD = trace.state_LTD[layer]
            vector_N, place_N = _who_gets_what(frame, own.rule, len(state_TD))
            state_ND = state_TD[place_N]
            column_N = self._at(layer)[vector_N]
            self._state_LVD[at].index_add_(0, column_N, state_ND)
            self._length_LV[at].index_add_(0, column_N, state_ND.norm(dim=-1))
            self._count_LV[at].index_add_(0, column_N, torch.ones(len(column_N)))
            if own.scale_VD is not None:
                scaled_N = (state_ND * own.scale_VD[vector_N]).norm(dim=-1)
                self._scaled_LV[at].index_add_(0, column_N, scaled_N)
            if own.down_DR is not None and own.up_RD is not None:
                product_TD = state_TD @ own.down_DR @ own.up_RD
                self._product_L[at] += product_TD.norm(dim=-1).sum()
                self._all_length_L[at] += state_TD.norm(dim=-1).sum()

    def vectors(
        self, places: Places, slot_names: Sequence[str], token_names: Sequence[str]
    ) -> Vectors:
        """The learned numbers beside these states. token_names: of the special ids, in their order."""
        vector_LVD = self._table("vector_VD")
        state_norm_LV = self._length_LV / self._count_LV  # 0 / 0: NaN
        norm_LV = vector_LVD.norm(dim=-1)
        unit_LVD = F.normalize(vector_LVD, dim=-1)
        has_scale, has_product = self._config.scale, self._config.rank > 0
        return Vectors(
            about=_about(self._config),
            layers=tuple(self._learned),
            names=self._names(places, slot_names, token_names),
            everywhere=self._config.everywhere,
            norm_LV=norm_LV,
            state_norm_LV=state_norm_LV,
            ratio_LV=norm_LV / state_norm_LV,
            state_cosine_LV=F.cosine_similarity(
                vector_LVD, self._state_LVD / self._count_LV[..., None], dim=-1
            ),
            slot_cosine_LVV=unit_LVD @ unit_LVD.transpose(1, 2),
            layer_cosine_VLL=unit_LVD.transpose(0, 1) @ unit_LVD.permute(1, 2, 0),
            scale_norm_LV=self._table("scale_VD").norm(dim=-1) if has_scale else None,
            scale_ratio_LV=self._scaled_LV / self._length_LV if has_scale else None,
            product_norm_L=self._product_norms() if has_product else None,
            product_ratio_L=self._product_L / self._all_length_L if has_product else None,
            bias_norm_L=self._bias_norms() if self._config.bias_layers else None,
            bias_ratio_L=(
                self._bias_norms() / self._bias_norms("own_bias_norm")
                if self._config.bias_layers
                else None
            ),
        )

    def _at(self, layer: int) -> Tensor:
        """Where the vectors of a layer stand among those of all."""
        return torch.tensor([self._all.index(column) for column in self._columns[layer]])

    def _table(self, name: str) -> Tensor:
        """(L, V, D); NaN where a layer has no such vector."""
        table_LVD = torch.full_like(self._state_LVD, torch.nan)
        for at, (layer, own) in enumerate(self._learned.items()):
            table_LVD[at, self._at(layer)] = getattr(own, name)
        return table_LVD

    def _product_norms(self) -> Tensor:
        return torch.stack(
            [
                torch.linalg.matrix_norm(own.down_DR @ own.up_RD)
                for own in self._learned.values()
                if own.down_DR is not None and own.up_RD is not None
            ]
        )

    def _bias_norms(self, name: str = "bias_norm") -> Tensor:
        return torch.tensor([getattr(own, name) for own in self._learned.values()])

    def _names(
        self, places: Places, slot_names: Sequence[str], token_names: Sequence[str]
    ) -> tuple[str, ...]:
        config, rules = self._config, [own.rule for own in self._learned.values()]
        every = ("every token",) if config.everywhere else ()
        if config.share == "by_token":
            return (*token_names, *every)
        slots = sorted(with_vectors(rules))
        if config.share == "all":
            is_all = rules[0].chosen is None
            what = "slots" if config.positions == "special" else "ordinary tokens"
            some = f"{what} {', '.join(str(slot + 1) for slot in slots)}"
            return (f"all {what}" if is_all else some, *every)
        if config.positions != "special":
            return (*(_ordinary_name(slot + 1, places) for slot in slots), *every)
        return (*(_slot_name(slot + 1, slot_names) for slot in slots), *every)


_EVERY = 2**31  # behind the slots


def _columns(rule: SlotRule) -> tuple[int, ...]:
    """What each vector of a layer is for, as numbers that all layers have in common."""
    every = (_EVERY,) if rule.everywhere else ()
    if rule.is_shared:
        return (0, *every)
    if rule.by_token:
        return (*range(len(rule.special_token_ids)), *every)
    return (*chosen(rule), *every)


def _who_gets_what(frame: Frame, rule: SlotRule, num_tokens: int) -> tuple[Tensor, Tensor]:
    """The vector of the layer that each place gets, and the place among the tokens."""
    place = frame.place(rule, 1, num_tokens, _CPU)
    present_S = place.present_BS1[0, :, 0]
    if place.vector_BS is not None:
        vector_S = place.vector_BS[0]
    else:  # the slot's own, or the only one
        vector_S = torch.arange(len(present_S)) * (rule.num_vectors > 1)
    return vector_S[present_S], place.index_BS[0, present_S]


def _slot_name(rank: int, slot_names: Sequence[str]) -> str:
    return slot_names[rank - 1] if rank <= len(slot_names) else f"{rank} (in no text)"


def _ordinary_name(rank: int, places: Places) -> str:
    return f"ordinary {rank}" + ("" if rank in places.ordinary else " (in no text)")


def _about(config: PastaConfig) -> str:
    """What is added to what, in words."""
    tokens = {
        "special": "each special token that has a vector",
        "first": "the first ordinary tokens, in the place of special ones",
        "random": "ordinary tokens that the text draws, in the place of special ones",
    }[config.positions]
    if config.positions == "special" and config.slots == "all" and config.layer_slots is None:
        tokens = "each special token"
    if config.everywhere:
        tokens += ", and to every token (one more vector),"
    where = "what keys and values read" if config.at == "keys-values" else "the input"
    more = (
        " These states are scaled as well, each number by its own factor." if config.scale else ""
    )
    if config.rank:
        more += f" Every token's state gets a product of itself, of rank {config.rank}, as well."
    if config.bias_layers:
        named = ", ".join(str(layer) for layer in config.bias_layers)
        more += f" The biases of products and norms in the layers {named} (from 0) change as well."
    return f"What is added to {tokens} at {where} of each layer.{more}"

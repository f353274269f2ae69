"""From what was kept of a text to the numbers of a look.

Shape letters: L layers, H heads, T tokens, S slots, D hidden, E size of a head's output, V learned
vectors of a layer, N places that get a vector.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from pastina.looking.records import Change, Heads, Vectors
from pastina.looking.trace import Trace
from pastina.methods.pasta import PastaConfig, PastaLayer
from pastina.methods.placement import Frame
from pastina.vertical import vertical_heads

Means = TypeVar("Means", Heads, Change)


def measure_heads(attention_LHTT: Tensor, slots: Sequence[int], num_slots: int) -> Heads:
    """What the heads look at in one text; slots: of each token, 0 for none."""
    columns_LHT = attention_LHTT.mean(2)
    share_LHS = torch.zeros(*attention_LHTT.shape[:2], num_slots)
    for place, slot in enumerate(slots):
        if slot:
            share_LHS[..., slot - 1] = columns_LHT[..., place]
    special = tuple(place for place, slot in enumerate(slots) if slot)
    published, everywhere = (
        torch.stack([vertical_heads(layer_HTT, columns) for layer_HTT in attention_LHTT]).float()
        for columns in ((0, -1), special)
    )
    return Heads(share_LHS, published, everywhere)


def measure_change(before: Trace, after: Trace, first: int) -> Change:
    """How far the output of each head moves; first: the place of the first special token."""
    size_LTH = before.output_LTHE.norm(dim=-1)
    moved_LTH = (after.output_LTHE - before.output_LTHE).norm(dim=-1)
    relative_LTH = moved_LTH / size_LTH.clamp_min(torch.finfo(size_LTH.dtype).tiny)
    return Change(relative_LTH[:, first], relative_LTH.mean(1))


def mean(parts: Iterable[Means]) -> Means:
    """The mean of each number over the texts."""
    parts = list(parts)
    kind = type(parts[0])
    names = [one.name for one in fields(kind)]
    return kind(*(torch.stack([getattr(p, n) for p in parts]).mean(0) for n in names))


@dataclass
class SlotStates:
    """The states that the vectors of a PASTA adapter are added to, summed over the texts.

    model: a PeftModel with the adapter "default".
    """

    model: Any
    _sum_LVD: Tensor | float = field(default=0.0, init=False)
    _norm_LV: Tensor | float = field(default=0.0, init=False)
    _count_V: Tensor | float = field(default=0.0, init=False)

    def add(self, trace: Trace, input_ids_BT: Tensor) -> None:
        """Take in one text."""
        rule, num_vectors = self._config.rule(0), len(self._names(()))
        place = Frame(input_ids_BT.cpu(), None).place(
            rule, 1, input_ids_BT.shape[1], torch.device("cpu")
        )
        present_S = place.present_BS1[0, :, 0]
        if place.vector_BS is not None:
            vector_S = place.vector_BS[0]
        elif num_vectors == 1:
            vector_S = torch.zeros(len(present_S), dtype=torch.long)
        else:
            vector_S = torch.arange(len(present_S))
        vector_N, state_LND = vector_S[present_S], trace.state_LTD[:, place.index_BS[0, present_S]]
        num_layers, _, size = state_LND.shape
        self._sum_LVD += torch.zeros(num_layers, num_vectors, size).index_add_(
            1, vector_N, state_LND
        )
        norm_LN = state_LND.norm(dim=-1)
        self._norm_LV += torch.zeros(num_layers, num_vectors).index_add_(1, vector_N, norm_LN)
        self._count_V += torch.bincount(vector_N, minlength=num_vectors)

    @property
    def _config(self) -> PastaConfig:
        return self.model.peft_config["default"]

    def _names(self, slot_names: Sequence[str]) -> tuple[str, ...]:
        config = self._config
        if config.share == "all":
            return ("all slots",)
        if config.share == "by_token":
            return tuple(f"token {number}" for number in config.special_token_ids or ())
        missing = range(len(slot_names) + 1, config.rule(0).num_slots + 1)
        return (*slot_names, *(f"{rank} (in no text)" for rank in missing))

    def vectors(self, slot_names: Sequence[str], token_names: Sequence[str]) -> Vectors:
        """The learned vectors beside these states. token_names: of the special ids, in their order."""
        tables = _tables(self.model)
        layers = tuple(sorted(tables))
        vector_LVD = torch.stack([tables[layer] for layer in layers])
        names = self._names(slot_names)
        if self._config.share == "by_token":
            names = tuple(token_names)
        at = list(layers)
        count_V = torch.as_tensor(self._count_V).float()
        state_norm_LV = (torch.as_tensor(self._norm_LV) / count_V)[at]  # 0 / 0: NaN
        state_LVD = (torch.as_tensor(self._sum_LVD) / count_V[:, None])[at]
        norm_LV = vector_LVD.norm(dim=-1)
        unit_LVD = F.normalize(vector_LVD, dim=-1)
        return Vectors(
            layers,
            names,
            norm_LV,
            state_norm_LV,
            norm_LV / state_norm_LV,
            F.cosine_similarity(vector_LVD, state_LVD, dim=-1),
            unit_LVD @ unit_LVD.transpose(1, 2),
            unit_LVD.transpose(0, 1) @ unit_LVD.permute(1, 2, 0),
        )


def _tables(model: Any) -> dict[int, Tensor]:
    """The vectors of each layer that has some, (V, D)."""
    found: dict[int, Tensor] = {}
    for module in model.modules():
        if not isinstance(module, PastaLayer) or "default" not in module.pasta_vectors:
            continue
        table = module.pasta_vectors["default"].detach().float().cpu()
        for call, row in module.pasta_rows["default"].items():
            found[module.indexes[call]] = table[row] if len(module.indexes) > 1 else table
    return found

"""The variants of PASTA as a look should see them: transformers' own forward, changed by hooks."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from pastina.methods.ordinary import rank_ordinary
from pastina.recipe import PastaOptions

TEXTS = [("we need the plum today", "please send me a hammer now"), ("thanks now", "a fig")]
SPECIAL = (2, 3)  # [CLS] and [SEP] of the toy tokenizer


@dataclass
class Variant:
    """owners: which token gets which vector of a layer, from the layer and the ids of a text."""

    options: PastaOptions
    owners: Callable[[int, list[int]], list[tuple[int, int]]]
    names: tuple[str, ...]
    slots: tuple[str, ...] = ("1 [CLS]", "2 [SEP]", "3 [SEP]")
    # layer -> the number in the table of each name; None: the layer does not have it
    rows: dict[int, list[int | None]] = field(default_factory=dict)
    columns: tuple[str, ...] = ("vectors",)


def special(ids: list[int]) -> list[int]:
    return [place for place, token in enumerate(ids) if token in SPECIAL]


def by_slot(layer: int, ids: list[int]) -> list[tuple[int, int]]:
    return [(place, slot) for slot, place in enumerate(special(ids))]


def by_token(layer: int, ids: list[int]) -> list[tuple[int, int]]:
    return [(place, SPECIAL.index(ids[place])) for place in special(ids)]


def wide(layer: int, ids: list[int]) -> list[tuple[int, int]]:
    return [*by_token(layer, ids), *((place, 2) for place in range(len(ids)))]


def ordinary(layer: int, ids: list[int]) -> list[tuple[int, int]]:
    places = [place for place, token in enumerate(ids) if token not in SPECIAL]
    return [(place, number) for number, place in enumerate(places[: len(special(ids))])]


def drawn(layer: int, ids: list[int]) -> list[tuple[int, int]]:
    is_special = torch.tensor([[int(token in SPECIAL) for token in ids]])
    ranks = rank_ordinary(torch.tensor([ids]), is_special, None, "random")[0].tolist()
    assert sum(rank > 0 for rank in ranks) == 3
    return [(place, rank - 1) for place, rank in enumerate(ranks) if rank]


def option(**settings: Any) -> PastaOptions:
    return PastaOptions(**settings)


THREE = ("1 [CLS]", "2 [SEP]", "3 [SEP]")
ORDINARY = ("ordinary 1", "ordinary 2", "ordinary 3")
EVERY = "vector of every token"
VARIANTS = {
    "pasta-wide": Variant(
        option(share="by_token", everywhere=True),
        wide,
        ("[CLS]", "[SEP]", "every token"),
        columns=("vectors", EVERY),
    ),
    "pasta-tagger": Variant(
        option(share="by_token", everywhere=True, rank=2),
        wide,
        ("[CLS]", "[SEP]", "every token"),
        columns=("vectors", EVERY, "product"),
    ),
    "shared and everywhere": Variant(
        option(share="all", everywhere=True),
        lambda layer, ids: [
            *((place, 0) for place in special(ids)),
            *((place, 1) for place in range(len(ids))),
        ],
        ("all slots", "every token"),
        columns=("vectors", EVERY),
    ),
    "scale": Variant(
        option(scale=True, everywhere=True),
        lambda layer, ids: [
            *by_slot(layer, ids),
            *((place, 3) for place in range(len(ids))),
        ],
        (*THREE, "every token"),
        columns=("vectors", EVERY, "scales", "scale of every token"),
    ),
    "extra tokens": Variant(
        option(extra_tokens=2),
        by_slot,
        (*THREE, "4 [SEP]+1", "5 [SEP]+2"),
        (*THREE, "4 [SEP]+1", "5 [SEP]+2"),
    ),
    "first": Variant(
        option(slots="first"), lambda layer, ids: [(special(ids)[0], 0)], ("1 [CLS]",)
    ),
    "rest": Variant(
        option(slots="rest"),
        lambda layer, ids: [(place, slot - 1) for place, slot in by_slot(layer, ids) if slot],
        ("2 [SEP]", "3 [SEP]"),
    ),
    "some share": Variant(
        option(slots=(0, 2), share="all"),
        lambda layer, ids: [(place, 0) for place, slot in by_slot(layer, ids) if slot != 1],
        ("slots 1, 3",),
    ),
    "layer_slots": Variant(
        option(layer_slots=(2, 0)),
        lambda layer, ids: [(special(ids)[(2, 0)[layer]], 0)],
        ("1 [CLS]", "3 [SEP]"),
        rows={0: [None, 0], 1: [0, None]},
    ),
    "layer_slots and everywhere": Variant(
        option(layer_slots=(2, 0), everywhere=True),
        lambda layer, ids: [
            (special(ids)[(2, 0)[layer]], 0),
            *((place, 1) for place in range(len(ids))),
        ],
        ("1 [CLS]", "3 [SEP]", "every token"),
        rows={0: [None, 0, 1], 1: [0, None, 1]},
        columns=("vectors", EVERY),
    ),
    "first positions": Variant(
        option(positions="first"),
        ordinary,
        ORDINARY,
        (*THREE, *ORDINARY),
        columns=("attention on ordinary", "vectors"),
    ),
    "random positions": Variant(
        option(positions="random"),
        drawn,
        ORDINARY,
        (*THREE, *ORDINARY),
        columns=("attention on ordinary", "vectors"),
    ),
    "rest of the positions": Variant(
        option(positions="first", slots="rest", share="all"),
        lambda layer, ids: [(place, 0) for place, rank in ordinary(layer, ids) if rank],
        ("ordinary tokens 2, 3",),
        (*THREE, "ordinary 2", "ordinary 3"),
        columns=("attention on ordinary", "vectors"),
    ),
    "keys-values": Variant(option(at="keys-values"), by_slot, THREE),
    "scaled keys-values": Variant(
        option(at="keys-values", scale=True, everywhere=True),
        lambda layer, ids: [*by_slot(layer, ids), *((place, 3) for place in range(len(ids)))],
        (*THREE, "every token"),
        columns=("vectors", EVERY, "scales", "scale of every token"),
    ),
}


class Reference:
    """transformers' own forward with the change of a variant, by loops over the tokens, from hooks."""

    def __init__(self, folder: Path, adapter: Path, variant: Variant) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.variant = variant
        self.tables = tables_in(adapter)
        self.models = [self.build(folder, with_adapter) for with_adapter in (False, True)]

    def build(self, folder: Path, with_adapter: bool) -> Any:
        model: Any = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
        for index, layer in enumerate(model.encoder.layer):
            layer.attention.output.dense.register_forward_pre_hook(self.keep_output)
            layer.register_forward_pre_hook(self.keep_state(index))
            if with_adapter:
                inside = layer.attention.self.key, layer.attention.self.value
                changed = inside if self.variant.options.at == "keys-values" else (layer,)
                for module in changed:
                    module.register_forward_pre_hook(self.change(index))
        return model

    def keep_output(self, module: Any, args: Any) -> None:
        self.outputs.append(args[0][0].unflatten(-1, (2, -1)).transpose(0, 1))

    def keep_state(self, index: int) -> Any:
        def keep(module: Any, args: Any) -> None:
            self.states.append(args[0][0])

        return keep

    def change(self, index: int) -> Any:
        own = self.tables[index]

        def hook(module: Any, args: Any) -> Any:
            given_TD = args[0][0]
            changed_TD = given_TD.clone()
            for place, vector in self.variant.owners(index, self.ids):
                changed_TD[place] += own["pasta_vectors"][vector]
                if "pasta_scales" in own:
                    changed_TD[place] += given_TD[place] * own["pasta_scales"][vector]
            if "pasta_downs" in own:
                changed_TD += given_TD @ (own["pasta_downs"] @ own["pasta_ups"])
            return (changed_TD[None], *args[1:])

        return hook

    @torch.no_grad()
    def run(self, pair: tuple[str, str]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Attention, outputs of the heads and states, without the adapter and with it."""
        inputs = self.tokenizer(*pair)
        extra = self.variant.options.extra_tokens
        self.ids = inputs["input_ids"] + inputs["input_ids"][-1:] * extra
        types = inputs["token_type_ids"] + inputs["token_type_ids"][-1:] * extra
        found = []
        for model in self.models:
            self.outputs: list[Tensor] = []
            self.states: list[Tensor] = []
            given = {"input_ids": [self.ids], "token_type_ids": [types]}
            given_BT = {name: torch.tensor(value) for name, value in given.items()}
            answer = model(**given_BT, output_attentions=True)
            attention_LHTT = torch.stack(answer.attentions)[:, 0]
            found.append((attention_LHTT, torch.stack(self.outputs), torch.stack(self.states)))
        return found


def tables_in(adapter: Path) -> list[dict[str, Tensor]]:
    """The learned numbers of each layer, by the kind of table."""
    found: dict[int, dict[str, Tensor]] = {}
    for name, tensor in load_file(adapter / "adapter_model.safetensors").items():
        parts = name.split(".")
        if parts[-1].startswith("pasta_"):
            found.setdefault(int(parts[parts.index("layer") + 1]), {})[parts[-1]] = tensor
    return [found[layer] for layer in sorted(found)]

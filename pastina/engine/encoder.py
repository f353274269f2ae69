"""A frozen backbone for the packed engine: what all tasks on it share.

Shape letters: P packed tokens, B rows, T tokens, S slots, H hidden.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pastina.backbones import with_same_weights
from pastina.engine.addition import Addition
from pastina.engine.affine import Precision
from pastina.engine.embeddings import Embeddings, make_embeddings
from pastina.engine.families import FAMILIES, freeze_layers, lowest_layers
from pastina.engine.frozen import FrozenLayer
from pastina.engine.once import MAKING
from pastina.engine.packing import Pack, pack
from pastina.engine.passing import are_fused
from pastina.engine.readout import Part, Readout
from pastina.engine.sweep import Sweep, encode
from pastina.methods.layers import keep_layers
from pastina.methods.placement import Placement


class Encoder:
    """Reads padded batches with a backbone of a known family; its weights are read once.

    whole: the encoder of the same backbone with more layers, of which this one has the lowest.
    """

    def __init__(
        self, backbone: Any, precision: Precision = "fp32", whole: "Encoder | None" = None
    ) -> None:
        self.backbone, self._whole = backbone, whole
        self.precision: Precision = precision
        self.family = FAMILIES[type(backbone).__name__]
        self._layers: list[FrozenLayer] = []
        self._embeddings: Embeddings | None = None
        self._device: torch.device | None = None  # where they are

    def lower(self, num_layers: int) -> "Encoder":
        """The same with the lowest layers alone, on the same weights."""
        backbone = with_same_weights(self.backbone)
        keep_layers(backbone, num_layers)
        return Encoder(backbone, self.precision, self)

    @property
    def _pooler(self) -> Any:
        return getattr(self.backbone, "pooler", None)

    def pack(self, is_real_BT: Tensor) -> Pack:
        """The batch without its padding."""
        return pack(is_real_BT, self.backbone.config.num_attention_heads)

    def states(
        self,
        inputs: Mapping[str, Tensor],
        packed: Pack,
        additions: Mapping[int, Addition],
        parts: Sequence[Part],
        lower: tuple[int, Tensor] | None = None,
        keys_P: Tensor | None = None,
    ) -> list[Tensor]:
        """What the heads of each part are given, (N, H) in fp32.

        lower: a layer and its input (P, H), where that is known already; it is written over.
        keys_P: see Sweep.
        """
        readout = Readout(packed, parts)
        start, hidden_PH = lower or (0, self.embed(inputs, packed))
        sweep = Sweep(self.layers(hidden_PH.device), packed, readout, start, keys_P)
        return readout.pool(encode(sweep, hidden_PH, additions), self._pooler)

    @torch.no_grad()
    def lower_states(self, inputs: Mapping[str, Tensor], packed: Pack, stop: int) -> Tensor:
        """The input of layer `stop`, (P, H), with nothing added below."""
        hidden_PH = self.embed(inputs, packed)
        for layer in self.layers(hidden_PH.device)[:stop]:
            hidden_PH, _ = layer.run(hidden_PH, packed, None, False, False)
        return hidden_PH

    def layers(self, device: torch.device) -> list[FrozenLayer]:
        """The frozen layers, read again when the model moved to another device."""
        if self._device != device:
            with MAKING:
                if self._device != device:  # another thread may have been here
                    self._freeze(device)
        return self._layers

    def _freeze(self, device: torch.device) -> None:
        if self._whole is None:
            self._layers = freeze_layers(self.backbone, self.precision)
        else:
            self._layers = lowest_layers(self.backbone, self._whole.layers(device))
        self._embeddings = None
        if device.type == "cpu" and are_fused(self._layers):
            self._embeddings = make_embeddings(self.backbone, self.family)
        self._device = device

    def embeddings(self, device: torch.device) -> Embeddings | None:
        """The embeddings as the kernels read them; None where the layers or these are none of theirs."""
        self.layers(device)
        return self._embeddings

    @torch.no_grad()
    def embed(self, inputs: Mapping[str, Tensor], packed: Pack) -> Tensor:
        """The input of layer 0, (P, H)."""
        ids_BT = inputs["input_ids"]
        given = {"input_ids": ids_BT}
        if not self.family.embeds_ids_alone:
            given["position_ids"] = self._positions(ids_BT)
            if (types_BT := inputs.get("token_type_ids")) is not None:
                given["token_type_ids"] = types_BT
        given = {name: t.flatten()[packed.token_P] for name, t in given.items()}
        if (known := self.embeddings(ids_BT.device)) is not None:
            types_P = given.get("token_type_ids")
            return known.embed(given["input_ids"], given["position_ids"], types_P)
        hidden = self.backbone.embeddings(**{name: t.unsqueeze(0) for name, t in given.items()})
        if (project := getattr(self.backbone, "embeddings_project", None)) is not None:
            hidden = project(hidden)
        return hidden[0]

    def _positions(self, ids_BT: Tensor) -> Tensor:
        if not self.family.offset:
            return torch.arange(ids_BT.shape[1], device=ids_BT.device).expand_as(ids_BT)
        padding = self.backbone.embeddings.padding_idx
        is_text_BT = ids_BT != padding
        return is_text_BT.cumsum(1) * is_text_BT + padding


def spots(placement: Placement, place_BS: Tensor) -> tuple[Tensor, Tensor | None]:
    """The packed tokens of the slots, and which slots these are, both flat; None: all.

    place_BS: the packed token at each slot, below 0 where the token is masked.
    """
    place = place_BS.flatten()
    is_there = placement.present_BS1.flatten() & (place >= 0)
    if bool(is_there.all()):
        return place, None
    chosen = is_there.nonzero().squeeze(1)
    return place[chosen], chosen

"""Any backbone at all, by its own forward: vectors are added by hooks. The truth for the packed one.

Shape letters: B rows, T tokens, N items, H hidden.
"""

import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pastina.backbones import with_same_weights
from pastina.engine.addition import Addition
from pastina.engine.affine import Precision
from pastina.engine.readout import Part
from pastina.engine.reference import check_precision
from pastina.methods.biases import BiasPart, bias_parts, shifted
from pastina.methods.layers import find_layers, keep_layers


@dataclass(frozen=True, slots=True)
class Padded:
    """A batch as it is. place_BT: the place of each token, flat, -1 where it is padding."""

    is_real_BT: Tensor
    place_BT: Tensor


class HookedEncoder:
    """What `Encoder` does, for backbones that it does not know; gradients pass by autograd."""

    def __init__(self, backbone: Any, precision: Precision = "fp32") -> None:
        check_precision(precision)
        self.backbone = backbone
        self.precision: Precision = precision
        found = find_layers(backbone)
        self._layers = [
            (backbone.get_submodule(name), calls)
            for name, calls in zip(found.names, found.indexes, strict=True)
        ]
        self._lock = threading.Lock()  # a hook acts on whoever runs the backbone

    def lower(self, num_layers: int) -> "HookedEncoder":
        """The same with the lowest layers alone, on the same weights."""
        with self._lock:  # a copy takes along the hooks of whoever runs the backbone
            backbone = with_same_weights(self.backbone)
        keep_layers(backbone, num_layers)
        return HookedEncoder(backbone, self.precision)

    def pack(self, is_real_BT: Tensor) -> Padded:
        """Nothing is packed; says where the tokens are."""
        places = torch.arange(is_real_BT.numel(), device=is_real_BT.device)
        return Padded(is_real_BT, places.masked_fill(~is_real_BT.flatten(), -1))

    def states(
        self,
        inputs: Mapping[str, Tensor],
        packed: Padded,
        additions: Mapping[int, Addition],
        parts: Sequence[Part],
    ) -> list[Tensor]:
        """What the heads of each part are given, (N, H) in fp32."""
        mask_BT = packed.is_real_BT.long()
        device = mask_BT.device.type
        with self._lock, ExitStack() as stack:
            for layer, calls in self._layers:
                hook = _AddingHook([additions.get(call) for call in calls])
                handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
                if any(a is not None and a.shifts for a in hook.all):
                    for part in bias_parts(layer):
                        handle = part.module.register_forward_hook(partial(hook.shift, part))
                        stack.callback(handle.remove)
            with torch.autocast(device, torch.bfloat16, enabled=self.precision == "bf16"):
                output = self.backbone(**{**inputs, "attention_mask": mask_BT})
        return [_pool(output, mask_BT, part).float() for part in parts]


class _AddingHook:
    """Adds to what a layer is given, and to what its parts put out; a layer that is called several times
    adds in turn."""

    def __init__(self, additions: list[Addition | None]) -> None:
        self.all = additions
        self._next = iter(additions)
        self._running: Addition | None = None
        self._num_tokens = 0

    def __call__(self, module: Any, args: Any, kwargs: Any) -> Any:
        self._running = addition = next(self._next)
        if addition is None:
            return None
        given = args[0] if args else kwargs["hidden_states"]
        self._num_tokens = given.shape[0] * given.shape[1]
        if args:
            return (_added(given, addition), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": _added(given, addition)}

    def shift(self, part: BiasPart, module: Any, args: Any, output: Tensor) -> Tensor:
        """What a part of the layer puts out, (B, T, size), with other biases for some tokens."""
        flat = output.reshape(-1, output.shape[-1])
        for tokens_N, values_D in self._running.shifts if self._running is not None else ():
            flat = shifted(flat, tokens_N, values_D[part.place], self._num_tokens)
        return flat.view_as(output)


def _added(hidden_BTH: Tensor, addition: Addition) -> Tensor:
    given = flat = hidden_BTH.reshape(-1, hidden_BTH.shape[-1])
    flat = flat.index_add(0, addition.tokens_R, addition.delta_RH.to(flat.dtype))
    for tokens_N, down_HK, up_KH in addition.products:
        product_NH = given[tokens_N].to(down_HK.dtype) @ down_HK @ up_KH
        flat = flat.index_add(0, tokens_N, product_NH.to(flat.dtype))
    return flat.view_as(hidden_BTH)


def _pool(output: Any, mask_BT: Tensor, part: Part) -> Tensor:
    hidden_BTH = output.last_hidden_state
    if part.pooling == "tokens":
        assert part.items is not None
        return hidden_BTH[part.items]
    own, mask = hidden_BTH[part.rows], mask_BT[part.rows]
    if part.pooling == "pooler":
        return output.pooler_output[part.rows]
    if part.pooling == "cls":
        return own[torch.arange(len(own), device=own.device), mask.argmax(1)]
    mask_BT1 = mask.unsqueeze(-1)
    return (own * mask_BT1).sum(1) / mask_BT1.sum(1)

"""All layers in one call, for answers: a row goes through all of them on one thread, so that no thread
waits for another between layers.

Shape letters: P packed tokens, N states that are read, H hidden.
"""

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pastina.engine import native
from pastina.engine.addition import Addition
from pastina.engine.frozen import FrozenLayer
from pastina.engine.fused import FusedLayer
from pastina.engine.packing import Pack
from pastina.engine.readout import Readout

_LONG = 48  # tokens of a row that one thread works on, whatever the others do meanwhile


def can_pass(layers: Sequence[FrozenLayer], packed: Pack) -> bool:
    """Whether `pass_through` knows these layers and no row is so long that the others wait for it."""
    return are_fused(layers) and are_short(packed.longest, packed.num_tokens)


def are_fused(layers: Sequence[FrozenLayer]) -> bool:
    """Whether all of the layers are made of the kernels."""
    return bool(layers) and all(isinstance(layer, FusedLayer) for layer in layers)


def are_short(longest: int, num_tokens: int) -> bool:
    """Whether no row of so many tokens keeps one thread busy when the others are done."""
    return longest <= max(_LONG, num_tokens // torch.get_num_threads())


def pass_through(
    layers: Sequence[FrozenLayer],
    packed: Pack,
    readout: Readout,
    hidden_PH: Tensor,
    additions: Mapping[int, Addition],
) -> Tensor:
    """The states that are read, (N, H); writes over hidden_PH. additions: by place in `layers`."""
    read_N, one_each = readout.read_N, readout.one_each
    if read_N is not None and not len(read_N):
        return hidden_PH.new_empty(0, hidden_PH.shape[1])
    told = Told(layers, one_each=one_each)
    added, kept = (native.Added * len(layers))(), []
    for index, addition in additions.items():
        tokens_R, delta_RH, scale_RH, products, shifts = addition
        assert not products, "they are not known here"
        assert not shifts, "they are not known here"
        tokens_R, delta_RH = tokens_R.contiguous(), delta_RH.float().contiguous()
        scale_RH = None if scale_RH is None else scale_RH.float().contiguous()
        kept.append((tokens_R, delta_RH, scale_RH))
        added[index] = native.Added(
            tokens=tokens_R.data_ptr(),
            delta=delta_RH.data_ptr(),
            scale=None if scale_RH is None else scale_RH.data_ptr(),
            count=len(tokens_R),
        )
    hidden_PH = hidden_PH.float().contiguous()
    num_read = len(hidden_PH) if read_N is None else len(read_N)
    out_NH = hidden_PH.new_empty(num_read, hidden_PH.shape[1])
    about = told.about(
        start=packed.start_B.data_ptr(),
        length=packed.length_B.data_ptr(),
        num_rows=len(packed.start_B),
        added=ctypes.addressof(added),
        read=None if read_N is None else read_N.data_ptr(),
        num_read=num_read,
        one_each=one_each,
        hidden=hidden_PH.data_ptr(),
        out=out_NH.data_ptr(),
    )
    library = native.kernels()
    assert library is not None, "can_pass() was not asked"
    library.pastina_pass(ctypes.byref(about), torch.get_num_threads())
    return out_NH


class Told:
    """What the kernels are told of layers that `can_pass` takes. one_each: the last one may have to work
    for one state of a row alone."""

    def __init__(self, layers: Sequence[FrozenLayer], *, one_each: bool) -> None:
        fused = [layer for layer in layers if isinstance(layer, FusedLayer)]
        last = fused[-1].for_pass_end if one_each else fused[-1].for_pass
        self._kept = [layer.for_pass for layer in fused[:-1]] + [last]
        self._addresses = (ctypes.c_void_p * len(fused))(*map(ctypes.addressof, self._kept))
        self.num_layers = len(fused)
        self._heads, self._size = fused[0].num_heads, fused[0].head_size

    def about(self, **rest: Any) -> native.Pass:
        """A pass through these layers; what else there is to say of it. Keep this meanwhile."""
        return native.Pass(
            layers=ctypes.addressof(self._addresses),
            num_layers=self.num_layers,
            heads=self._heads,
            size=self._size,
            **rest,
        )

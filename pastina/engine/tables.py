"""The embeddings of a frozen backbone as the kernels read them: what a token is before the first layer.

All ways through the packed engine take them from here, where they can: otherwise what two ways make of a
text differs in its last bits, and products in int8 make more of that.

Shape letters: P packed tokens, H hidden.
"""

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pastina.engine import native
from pastina.engine.families import Family


class Tables(NamedTuple):
    """The embeddings of a backbone. modules: what `told` points into."""

    told: native.Embedding
    num_tokens: int
    num_positions: int
    num_types: int
    hidden_size: int
    modules: Any

    def check(self, ids: Sequence[int], types: Sequence[int] | None) -> None:
        """Nothing, if there are such tokens.

        Raises:
            IndexError: as torch's embeddings would.
        """
        _check_below("Token ids", min(ids), max(ids), self.num_tokens)
        if types is not None:
            _check_below("Token types", min(types), max(types), self.num_types)

    def embed(self, ids_P: Tensor, positions_P: Tensor, types_P: Tensor | None) -> Tensor:
        """The input of layer 0, (P, H) in fp32. positions_P: as the backbone's own table counts.

        Raises:
            IndexError: there is no such token, position or type.
        """
        tensors = [ids_P.contiguous(), positions_P.contiguous()]
        limits = [("Token ids", self.num_tokens), ("Positions", len(self.modules[1]))]
        if types_P is not None:
            tensors.append(types_P.contiguous())
            limits.append(("Token types", self.num_types))
        hidden_PH = torch.empty(len(ids_P), self.hidden_size)
        if not len(ids_P):
            return hidden_PH
        for tensor, (what, limit) in zip(tensors, limits, strict=True):
            least, most = tensor.aminmax()
            _check_below(what, int(least), int(most), limit)
        pointers = [tensor.data_ptr() for tensor in tensors] + [None] * (3 - len(tensors))
        library = native.kernels()
        assert library is not None
        library.pastina_embed(
            *(ctypes.byref(self.told), *pointers, len(ids_P), self.hidden_size),
            *(hidden_PH.data_ptr(), torch.get_num_threads()),
        )
        return hidden_PH


def make_tables(backbone: Any, family: Family) -> Tables | None:
    """Of a backbone that adds up words, positions and types, and norms them; None: it does more."""
    if family.embeds_ids_alone or getattr(backbone, "embeddings_project", None) is not None:
        return None
    own = backbone.embeddings
    word, position, norm = own.word_embeddings, own.position_embeddings, own.LayerNorm
    kind = getattr(own, "token_type_embeddings", None)
    modules = [word, position, norm] + ([] if kind is None else [kind])
    is_plain = all(type(m) is nn.Embedding for m in (word, position, kind or word))
    weights = [m.weight for m in modules]
    if not is_plain or any(w.dtype != torch.float32 or not w.is_contiguous() for w in weights):
        return None
    padding = own.padding_idx if family.offset else -1
    told = native.Embedding(
        word=word.weight.data_ptr(),
        position=position.weight.data_ptr(),
        type=None if kind is None else kind.weight.data_ptr(),
        norm_weight=norm.weight.data_ptr(),
        norm_bias=norm.bias.data_ptr(),
        norm_eps=norm.eps,
        padding=padding,
    )
    num_types = 1 << 30 if kind is None else kind.num_embeddings
    num_positions = position.num_embeddings - (padding + 1)
    size = word.embedding_dim
    return Tables(told, word.num_embeddings, num_positions, num_types, size, weights)


def _check_below(what: str, least: int, most: int, limit: int) -> None:
    if not 0 <= least <= most < limit:
        raise IndexError(
            f"{what} from {least} to {most}, but the backbone has embeddings for 0 to {limit - 1}. "
            "Use the tokenizer that belongs to the backbone."
        )

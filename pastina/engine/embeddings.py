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

_TOKENIZER = "Use the tokenizer that belongs to the backbone."
_SHORTER = "Lower max_length."


class Embeddings(NamedTuple):
    """What a backbone adds up for a token, read once.

    num_positions: tokens of a row at most; num_places: rows of the table of positions. kept: what `told`
    points into, whatever becomes of the modules.
    """

    told: native.Embedding
    num_tokens: int
    num_positions: int
    num_places: int
    num_types: int
    hidden_size: int
    kept: tuple[Tensor, ...]

    def check(self, ids: Sequence[int], types: Sequence[int] | None) -> None:
        """Nothing, if there are such tokens.

        Raises:
            IndexError: as torch's embeddings would.
        """
        _check_below("Token ids", min(ids), max(ids), self.num_tokens, _TOKENIZER)
        if types is not None:
            _check_below("Token types", min(types), max(types), self.num_types, _TOKENIZER)

    def embed(self, ids_P: Tensor, positions_P: Tensor, types_P: Tensor | None) -> Tensor:
        """The input of layer 0, (P, H) in fp32. positions_P: as the backbone's own table counts.

        Raises:
            IndexError: there is no such token, position or type.
        """
        hidden_PH = torch.empty(len(ids_P), self.hidden_size)
        if not len(ids_P):
            return hidden_PH
        asked = [
            (ids_P, "Token ids", self.num_tokens, _TOKENIZER),
            (positions_P, "Positions", self.num_places, _SHORTER),
        ]
        if types_P is not None:
            asked.append((types_P, "Token types", self.num_types, _TOKENIZER))
        for numbers_P, what, limit, advice in asked:
            least, most = numbers_P.aminmax()
            _check_below(what, int(least), int(most), limit, advice)
        tensors = [numbers_P.long().contiguous() for numbers_P, *_ in asked]
        pointers = [tensor.data_ptr() for tensor in tensors] + [None] * (3 - len(tensors))
        library = native.kernels()
        assert library is not None
        library.pastina_embed(
            *(ctypes.byref(self.told), *pointers, len(ids_P), self.hidden_size),
            *(hidden_PH.data_ptr(), torch.get_num_threads()),
        )
        return hidden_PH


def make_embeddings(backbone: Any, family: Family) -> Embeddings | None:
    """Of a backbone that adds up words, positions and types, and norms them; None: it does more."""
    if family.embeds_ids_alone or getattr(backbone, "embeddings_project", None) is not None:
        return None
    own = backbone.embeddings
    word, position, norm = own.word_embeddings, own.position_embeddings, own.LayerNorm
    kind = getattr(own, "token_type_embeddings", None)
    tables = [word, position] + ([] if kind is None else [kind])
    if any(type(table) is not nn.Embedding for table in tables):
        return None
    # aliases: a module that gets other numbers lets go of its own, and these stay
    kept = tuple(w.detach() for w in (*(t.weight for t in tables), norm.weight, norm.bias))
    if any(w.dtype != torch.float32 or not w.is_contiguous() for w in kept):
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
    return Embeddings(
        told,
        num_tokens=word.num_embeddings,
        num_positions=num_positions,
        num_places=position.num_embeddings,
        num_types=num_types,
        hidden_size=word.embedding_dim,
        kept=kept,
    )


def _check_below(what: str, least: int, most: int, limit: int, advice: str) -> None:
    if not 0 <= least <= most < limit:
        raise IndexError(
            f"{what} from {least} to {most}, but the backbone has embeddings for 0 to {limit - 1}. "
            f"{advice}"
        )

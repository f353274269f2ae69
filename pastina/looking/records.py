"""What a look finds: plain numbers, on the CPU.

Shape letters: L layers, H heads, T tokens, S slots, V learned vectors of a layer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Heads:
    """What the attention heads look at, on one side: without the adapter, or with it.

    share_LHS: the share of a head's attention that goes to each slot, 0 to 1, mean over the rows of
    the map (all tokens that look); the first Look.num_special slots are special tokens. vertical_LH:
    whether the head is vertical as published (nine rows in ten have their largest weight in the first
    or the last column), 1 or 0, over many texts the share of texts in which it is. vertical_all_LH: the
    same with the columns of all special tokens.
    """

    share_LHS: Tensor
    vertical_LH: Tensor
    vertical_all_LH: Tensor


@dataclass(frozen=True, slots=True)
class Change:
    """What the adapter does to the output of each head, before the heads are projected together.

    ||with - without|| / ||without||: first_LH at the first special token ([CLS]), mean_LH as the mean
    over all tokens. It holds what the layers below have changed already.
    """

    first_LH: Tensor
    mean_LH: Tensor


@dataclass(frozen=True, slots=True)
class Vectors:
    """The learned vectors of PASTA beside the states they are added to.

    about: what is added to what, in a sentence. layers: the layers that have vectors, L of them, counted
    from 0. names: of the V vectors of a layer. everywhere: the last of them goes to every token.

    norm_LV: L2 norm. state_norm_LV: mean L2 norm of the states that the vector is added to, as the
    layer (or its keys and values) is given them. ratio_LV: the one over the other. state_cosine_LV:
    cosine with the mean of these states. slot_cosine_LVV: between the vectors of a layer.
    layer_cosine_VLL: between layers. What is not there (a vector that the layer does not have, a state
    that no text has) is NaN.

    Where the state is scaled as well, h + h * s: scale_norm_LV is the L2 norm of s, and scale_ratio_LV
    the mean norm of h * s over that of h. Where a product h @ D @ U is added to every token:
    product_norm_L is the Frobenius norm of D @ U, and product_ratio_L the mean norm of h @ D @ U over
    that of h. Where biases of the layer learn: bias_norm_L is the L2 norm of what is added to them all,
    and bias_ratio_L that over the norm of the same biases of the backbone; NaN where a layer has none.
    """

    about: str
    layers: tuple[int, ...]
    names: tuple[str, ...]
    everywhere: bool
    norm_LV: Tensor
    state_norm_LV: Tensor
    ratio_LV: Tensor
    state_cosine_LV: Tensor
    slot_cosine_LVV: Tensor
    layer_cosine_VLL: Tensor
    scale_norm_LV: Tensor | None
    scale_ratio_LV: Tensor | None
    product_norm_L: Tensor | None
    product_ratio_L: Tensor | None
    bias_norm_L: Tensor | None
    bias_ratio_L: Tensor | None


@dataclass(frozen=True, slots=True)
class Maps:
    """The attention of one text: before_LHTT[l, h, i] is how token i spreads its attention."""

    before_LHTT: Tensor
    after_LHTT: Tensor


@dataclass(frozen=True, slots=True)
class TextLook:
    """One text, or one window of a long text that a tagger reads.

    slots: of each token, 0 for none. truncated: something was cut off, as for a prediction.
    """

    name: str
    text: str
    text_pair: str | None
    tokens: tuple[str, ...]
    slots: tuple[int, ...]
    truncated: bool
    before: Heads
    after: Heads
    change: Change
    maps: Maps | None


@dataclass(frozen=True, slots=True)
class Look:
    """What an adapter changes inside the backbone; returned by `pastina.look`.

    before, after, change: means over all texts. texts: those whose maps were kept, in order.
    slots: a name for each slot, its rank and its token. The first num_special are special tokens; where
    ordinary tokens have the vectors in their place, these follow. extra_tokens: special tokens written
    behind each text, on both sides, because the adapter learned with them.
    """

    name: str
    kind: str
    method: str
    backbone: str
    digest: str
    num_texts: int
    num_layers: int
    num_heads: int
    slots: tuple[str, ...]
    num_special: int
    extra_tokens: int
    before: Heads
    after: Heads
    change: Change
    vectors: Vectors | None
    texts: tuple[TextLook, ...]

    def on_special(self, heads: Heads) -> Tensor:
        """The share of each head's attention that goes to special tokens, (L, H)."""
        return heads.share_LHS[..., : self.num_special].sum(-1)

    def as_dict(self) -> dict[str, Any]:
        """The same as lists and numbers for JSON; what is not a number is None."""
        return plain(self)

    def save_page(self, path: str | Path) -> Path:
        """Write one HTML file that needs nothing else, no network either; returns its path."""
        from pastina.looking.report import write_page

        return write_page(self, Path(path))

    def save_picture(self, path: str | Path) -> Path:
        """Write a picture, .png or .svg; returns its path.

        Raises:
            PastinaError: matplotlib is missing; the name ends otherwise.
        """
        from pastina.looking.picture import draw

        return draw(self, Path(path))


def plain(value: Any) -> Any:
    """Records, tensors and tuples as dicts and lists; numbers to six places, not finite ones None."""
    if isinstance(value, Tensor):
        numbers = np.round(value.double().numpy(), 6)
        return numbers.tolist() if np.isfinite(numbers).all() else _finite(numbers.tolist())
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {name: plain(inner) for name, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(inner) for inner in value]
    return value


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return value if np.isfinite(value) else None

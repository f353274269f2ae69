"""The fast engine of BERT's family: no padding, nothing computed that nobody reads, no dead gradient.

The rows of a batch are laid one after the other (packed). The last layer works only where the head
reads, the first layer with vectors passes a gradient only to the tokens that got one, and layers
below it remember nothing. The frozen weights never get a gradient.

Random draws are those of the reference engine (vectors first, layer by layer, then the head), so both
train alike; only a tagger's head draws its dropout for the words it is asked for instead of all tokens.

Shape letters: P packed tokens, B rows, T tokens, N items or states that are read, R tokens that a
vector is added to, H hidden, C outputs.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DistributedDataParallel

from pastina.engine.batching import Batch
from pastina.engine.frozen import (
    ACTIVATIONS,
    Affine,
    Chunk,
    FrozenLayer,
    Norm,
    Saved,
    make_chunks,
)
from pastina.engine.reference import ReferenceEngine
from pastina.heads import TaskModel
from pastina.methods.pasta import PastaLayer
from pastina.methods.placement import Frame, Placement

logger = logging.getLogger("pastina")

_METHODS = ("PASTA", "LINEAR")
_INPUTS = {"input_ids", "attention_mask", "token_type_ids"}


# ---------------------------------------------------------------------------------------------------
# Families of backbones


class Parts(NamedTuple):
    """The modules of one layer, in the order in which they act."""

    query: Any
    key: Any
    value: Any
    out: Any
    norm1: Any
    up: Any
    down: Any
    norm2: Any


@dataclass(frozen=True, slots=True)
class Family:
    """What a class of backbones calls its modules. offset: positions count from padding_idx + 1."""

    layers: str
    parts: Callable[[Any], Parts]
    activation: str = "hidden_act"
    offset: bool = False


def _bert_parts(layer: Any) -> Parts:
    own, attention = layer.attention.self, layer.attention.output
    return Parts(
        query=own.query,
        key=own.key,
        value=own.value,
        out=attention.dense,
        norm1=attention.LayerNorm,
        up=layer.intermediate.dense,
        down=layer.output.dense,
        norm2=layer.output.LayerNorm,
    )


def _distilbert_parts(layer: Any) -> Parts:
    attention = layer.attention
    return Parts(
        query=attention.q_lin,
        key=attention.k_lin,
        value=attention.v_lin,
        out=attention.out_lin,
        norm1=layer.sa_layer_norm,
        up=layer.ffn.lin1,
        down=layer.ffn.lin2,
        norm2=layer.output_layer_norm,
    )


_BERT = Family("encoder.layer", _bert_parts)
_ROBERTA = Family("encoder.layer", _bert_parts, offset=True)
FAMILIES: dict[str, Family] = {
    "BertModel": _BERT,
    "ElectraModel": _BERT,
    "RobertaModel": _ROBERTA,
    "XLMRobertaModel": _ROBERTA,
    "CamembertModel": _ROBERTA,
    "DistilBertModel": Family("transformer.layer", _distilbert_parts, activation="activation"),
}


def why_not_packed(model: Any) -> str | None:
    """Why the packed engine cannot run this model; None: it can."""
    if isinstance(model, DistributedDataParallel):
        return "the model is spread over processes"
    task_model = _task_model(model)
    if task_model is None:
        return f"{type(model).__name__} holds no TaskModel"
    methods = {str(getattr(c.peft_type, "value", c.peft_type)) for c in _configs(model)}
    if unknown := sorted(methods - set(_METHODS)):
        return f"the method is {unknown[0]}, the packed engine knows {', '.join(_METHODS)}"
    backbone = task_model.backbone
    family = FAMILIES.get(type(backbone).__name__)
    if family is None:
        return f"the backbone is a {type(backbone).__name__}"
    return _why_not_backbone(backbone, family)


def _why_not_backbone(backbone: Any, family: Family) -> str | None:
    config = backbone.config
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        return "the backbone is a decoder"
    if getattr(config, family.activation) not in ACTIVATIONS:
        return f"the activation {getattr(config, family.activation)!r} is not known"
    for name, parameter in backbone.named_parameters():
        if "pasta_vectors" in name:
            continue
        if parameter.requires_grad:
            return f"{name} of the backbone is not frozen"
        if parameter.dtype != torch.float32:
            return f"{name} of the backbone is {parameter.dtype}"
    for layer in backbone.get_submodule(family.layers):
        for module in family.parts(_bare(layer)):
            if type(module) not in (nn.Linear, nn.LayerNorm):
                return f"the backbone has a {type(module).__name__} in its layers"
    return None


def _task_model(model: Any) -> TaskModel | None:
    return next((m for m in model.modules() if isinstance(m, TaskModel)), None)


def _configs(model: Any) -> list[Any]:
    return list(model.peft_config.values()) if isinstance(model, PeftModel) else []


def _bare(layer: Any) -> Any:
    return layer.base_layer if isinstance(layer, PastaLayer) else layer


def _freeze(layer: Any, family: Family, config: Any) -> FrozenLayer:
    """The layer's weights; query, key and value are copied into one, all others are shared."""
    parts = family.parts(_bare(layer))
    head_size = config.hidden_size // config.num_attention_heads
    size, scale = config.hidden_size, head_size**-0.5
    projections = [parts.query, parts.key, parts.value]
    weight = torch.cat([p.weight.detach() for p in projections])
    bias = torch.cat([p.bias.detach() for p in projections])
    weight[:size] *= scale
    bias[:size] *= scale
    return FrozenLayer(
        qkv=Affine(weight, bias),
        query=Affine(weight[:size], bias[:size]),
        key_value=Affine(weight[size:], bias[size:]),
        out=_affine(parts.out),
        norm1=_norm(parts.norm1),
        up=_affine(parts.up),
        act=ACTIVATIONS[getattr(config, family.activation)],
        down=_affine(parts.down),
        norm2=_norm(parts.norm2),
        head_size=head_size,
    )


def _affine(linear: nn.Linear) -> Affine:
    return Affine(linear.weight.detach(), linear.bias.detach())


def _norm(norm: nn.LayerNorm) -> Norm:
    return Norm(norm.weight.detach(), norm.bias.detach(), norm.eps)


# ---------------------------------------------------------------------------------------------------
# A batch, packed


@dataclass(frozen=True, slots=True)
class Pack:
    """Where the tokens of a batch went; rows are ordered by falling length.

    order_B: the batch's row of each packed row. token_P: the token's place in the batch (B * T).
    place_BT: the packed token at a place of the batch, -1 where it is padding. start_B: the first
    token of each packed row.
    """

    order_B: Tensor
    lengths: list[int]
    token_P: Tensor
    place_BT: Tensor
    start_B: Tensor
    chunks: list[Chunk]


def pack(is_real_BT: Tensor, num_heads: int) -> Pack:
    """Lay the real tokens of a batch one after the other."""
    num_rows, num_tokens = is_real_BT.shape
    length_B, order_B = is_real_BT.sum(1).sort(descending=True, stable=True)
    row_P, column_P = is_real_BT[order_B].nonzero(as_tuple=True)
    token_P = order_B[row_P] * num_tokens + column_P
    place_BT = torch.full((num_rows * num_tokens,), -1, device=token_P.device)
    place_BT[token_P] = torch.arange(len(token_P), device=token_P.device)
    lengths = length_B.tolist()
    chunks = make_chunks(lengths, num_heads, token_P.device)
    return Pack(order_B, lengths, token_P, place_BT, length_B.cumsum(0) - length_B, chunks)


# ---------------------------------------------------------------------------------------------------
# One pass through the layers


class Addition(NamedTuple):
    """Vectors that one layer adds to its input."""

    tokens_R: Tensor
    delta_RH: Tensor


class Sweep:
    """One forward through all layers and, if `first` is a layer, what its backward needs.

    read_N: the packed tokens whose last state is wanted, None: all; one_each: one of each row.
    """

    def __init__(
        self,
        layers: Sequence[FrozenLayer],
        chunks: list[Chunk],
        read_N: Tensor | None,
        one_each: bool,
    ) -> None:
        self.layers, self.chunks = layers, chunks
        self.read_N, self.one_each = read_N, one_each
        self.saved: list[Saved | None] = []
        self.num_tokens = 0

    def forward(
        self, hidden_PH: Tensor, additions: dict[int, Addition], first: int | None
    ) -> Tensor:
        """The last states that are read; writes over hidden_PH."""
        self.num_tokens = len(hidden_PH)
        for index, layer in enumerate(self.layers):
            if index in additions:
                hidden_PH.index_add_(0, *additions[index])
            keep = first is not None and index >= first
            hidden_PH, saved = layer.run(hidden_PH, self.chunks, *self._read(index), keep)
            self.saved.append(saved)
        return hidden_PH

    def backward(self, grad: Tensor, tokens: dict[int, Tensor]) -> dict[int, Tensor]:
        """The gradient of what was added to `tokens`, by layer; forgets what was kept."""
        if not self.saved:
            raise RuntimeError("The packed engine can go backward once. Call logits() again.")
        first, grads = min(tokens), {}
        for index in range(len(self.layers) - 1, first - 1, -1):
            saved = self.saved.pop()
            assert saved is not None
            only_R = tokens[index] if index == first else None
            grad = self.layers[index].back(
                grad, saved, self.num_tokens, self.chunks, *self._read(index), only_R
            )
            if index in tokens:
                grads[index] = grad if only_R is not None else grad[tokens[index]]
        self.saved.clear()
        return grads

    def _read(self, index: int) -> tuple[Tensor | None, bool]:
        is_last = index == len(self.layers) - 1
        return (self.read_N, self.one_each) if is_last else (None, False)


class _Encode(torch.autograd.Function):
    """A Sweep for autograd: a function of the added vectors alone."""

    @staticmethod
    def forward(
        ctx: Any, sweep: Sweep, hidden_PH: Tensor, tokens: dict[int, Tensor], *deltas: Tensor
    ) -> Tensor:
        learns = dict(zip(tokens, ctx.needs_input_grad[3:], strict=True))
        ctx.sweep = sweep
        ctx.tokens = {index: tokens_R for index, tokens_R in tokens.items() if learns[index]}
        ctx.indexes = list(tokens)
        additions = {i: Addition(*a) for i, *a in zip(tokens, tokens.values(), deltas, strict=True)}
        return sweep.forward(hidden_PH, additions, min(ctx.tokens))

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> Any:
        found = ctx.sweep.backward(grads[0].contiguous(), ctx.tokens)
        return None, None, None, *(found.get(index) for index in ctx.indexes)


# ---------------------------------------------------------------------------------------------------
# The engine


class PackedEngine:
    """See the top of the file. What it cannot run right now goes through the reference engine."""

    name = "packed"

    def __init__(self, model: Any) -> None:
        task_model = _task_model(model)
        assert task_model is not None, "why_not_packed() was not asked"
        self.reference = ReferenceEngine(model)
        self.task_model = task_model
        self.backbone: Any = task_model.backbone
        self.family = FAMILIES[type(self.backbone).__name__]
        self._frozen: list[FrozenLayer] = []
        self._told: set[str] = set()

    def logits(self, batch: Batch) -> Tensor:
        """The logits of the batch's items, (N, C)."""
        states = self.states(batch)
        return self.reference.logits(batch) if states is None else self.task_model.head(states)

    def states(self, batch: Batch) -> Tensor | None:
        """What the head reads for each item, (N, H); None where the reference engine must step in."""
        ids_BT = batch.inputs["input_ids"]
        mask_BT = batch.inputs.get("attention_mask")
        is_real_BT = torch.ones_like(ids_BT, dtype=torch.bool) if mask_BT is None else mask_BT != 0
        if reason := self._why_not_now(batch, is_real_BT):
            self._tell(reason)
            return None
        packed = pack(is_real_BT, self.backbone.config.num_attention_heads)
        read_N, one_each = self._read(batch, packed)
        additions = self._additions(ids_BT, mask_BT, packed)
        hidden_PH = self._embed(batch.inputs, packed)
        sweep = Sweep(self._layers(hidden_PH.device), packed.chunks, read_N, one_each)
        return self._pool(_encode(sweep, hidden_PH, additions), packed)

    def _why_not_now(self, batch: Batch, is_real_BT: Tensor) -> str | None:
        if self.backbone.training:
            return "the backbone is in train mode, with its own dropout; see methods.train_mode"
        if torch.is_autocast_enabled(is_real_BT.device.type):
            return "autocast is on"
        if other := sorted(set(batch.inputs) - _INPUTS):
            return f"the batch holds {other[0]}"
        if any(len(layer.active_adapters) > 1 for layer in self._adapted()):
            return "more than one adapter is active"
        if self.task_model.pooling == "pooler" and not bool(is_real_BT[:, 0].all()):
            return "a row is padded on the left, where the pooler reads"
        if self.task_model.pooling == "tokens" and batch.items is None:
            return "all tokens are asked for"
        if batch.items is not None and not bool(is_real_BT[batch.items].all()):
            return "a word is asked for whose token is masked"
        return None if bool(is_real_BT.any(1).all()) else "a row has no token"

    def _tell(self, reason: str) -> None:
        if reason not in self._told:
            logger.info("The reference engine steps in for the packed one: %s.", reason)
            self._told.add(reason)

    def _module_list(self) -> Any:
        return self.backbone.get_submodule(self.family.layers)

    def _adapted(self) -> list[PastaLayer]:
        return [layer for layer in self._module_list() if isinstance(layer, PastaLayer)]

    def _layers(self, device: torch.device) -> list[FrozenLayer]:
        """The frozen layers, read again when the model moved to another device."""
        if not self._frozen or self._frozen[0].qkv.weight.device != device:
            config = self.backbone.config
            self._frozen = [_freeze(layer, self.family, config) for layer in self._module_list()]
        return self._frozen

    def _read(self, batch: Batch, packed: Pack) -> tuple[Tensor | None, bool]:
        """Which packed tokens the head reads, and whether that is one of each row."""
        if self.task_model.pooling == "mean":
            return None, False
        if self.task_model.pooling != "tokens":
            return packed.start_B, True
        assert batch.items is not None
        row_N, column_N = batch.items
        num_tokens = len(packed.place_BT) // len(packed.order_B)
        return packed.place_BT[row_N * num_tokens + column_N], False

    def _additions(
        self, ids_BT: Tensor, mask_BT: Tensor | None, packed: Pack
    ) -> dict[int, Addition]:
        """What each layer adds, drawn as the reference draws it: `PastaLayer` itself is asked."""
        frame = Frame(ids_BT, mask_BT)
        additions: dict[int, Addition] = {}
        spots: dict[int, tuple[Tensor, Tensor | None]] = {}
        for index, layer in enumerate(self._module_list()):
            if not isinstance(layer, PastaLayer) or layer.disable_adapters:
                continue
            for name in layer.active_adapters:
                if 0 not in layer.pasta_rows.get(name, ()):
                    continue
                placement = frame.place(
                    layer.pasta_rule[name], len(ids_BT), ids_BT.shape[1], ids_BT.device
                )
                if id(placement) not in spots:
                    spots[id(placement)] = _spots(placement, packed)
                tokens_R, chosen = spots[id(placement)]
                delta = layer._delta(name, 0, placement).flatten(0, 1).float()
                delta_RH = delta if chosen is None else delta.index_select(0, chosen)
                additions[index] = Addition(tokens_R, delta_RH)
        frame.finish()
        return additions

    @torch.no_grad()
    def _embed(self, inputs: dict[str, Tensor], packed: Pack) -> Tensor:
        """The input of layer 0, by the model's own embeddings."""
        ids_BT = inputs["input_ids"]
        options = {}
        if (types_BT := inputs.get("token_type_ids")) is not None:
            options["token_type_ids"] = types_BT.flatten()[packed.token_P].unsqueeze(0)
        position_P = self._positions(ids_BT).flatten()[packed.token_P]
        hidden = self.backbone.embeddings(
            input_ids=ids_BT.flatten()[packed.token_P].unsqueeze(0),
            position_ids=position_P.unsqueeze(0),
            **options,
        )
        if (project := getattr(self.backbone, "embeddings_project", None)) is not None:
            hidden = project(hidden)
        return hidden[0]

    def _positions(self, ids_BT: Tensor) -> Tensor:
        if not self.family.offset:
            return torch.arange(ids_BT.shape[1], device=ids_BT.device).expand_as(ids_BT)
        padding = self.backbone.embeddings.padding_idx
        is_text_BT = ids_BT != padding
        return is_text_BT.cumsum(1) * is_text_BT + padding

    def _pool(self, states: Tensor, packed: Pack) -> Tensor:
        """What the head reads, in the order of the batch."""
        pooling = self.task_model.pooling
        if pooling == "tokens":
            return states
        num_rows = len(packed.order_B)
        if pooling == "mean":
            length_B = torch.tensor(packed.lengths, device=states.device)
            row_P = packed.order_B.repeat_interleave(length_B, output_size=len(states))
            sum_BH = states.new_zeros(num_rows, states.shape[1]).index_add(0, row_P, states)
            return (
                sum_BH / torch.zeros_like(length_B).index_copy(0, packed.order_B, length_B)[:, None]
            )
        first_BH = states.index_select(0, packed.order_B.argsort())
        return self.backbone.pooler(first_BH.unsqueeze(1)) if pooling == "pooler" else first_BH


def _spots(placement: Placement, packed: Pack) -> tuple[Tensor, Tensor | None]:
    """The packed tokens of the slots, and which slots these are; None: all."""
    place = packed.place_BT[placement.index_BS.flatten()]
    is_there = placement.present_BS1.flatten() & (place >= 0)
    if bool(is_there.all()):
        return place, None
    chosen = is_there.nonzero().squeeze(1)
    return place[chosen], chosen


def _encode(sweep: Sweep, hidden_PH: Tensor, additions: dict[int, Addition]) -> Tensor:
    learns = any(addition.delta_RH.requires_grad for addition in additions.values())
    if learns and torch.is_grad_enabled():
        tokens = {index: addition.tokens_R for index, addition in additions.items()}
        deltas = [addition.delta_RH for addition in additions.values()]
        states = _Encode.apply(sweep, hidden_PH, tokens, *deltas)
        assert isinstance(states, Tensor)
        return states
    with torch.no_grad():
        return sweep.forward(hidden_PH, additions, None)

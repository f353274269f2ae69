"""Families of backbones: where the parts of a layer are, and the layers frozen for the packed engine."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from pastina.engine.affine import Affine, Precision, make_affine
from pastina.engine.attention import Attention
from pastina.engine.frozen import ACTIVATIONS, FeedForward, FrozenLayer, NoNorm, Norm, gated
from pastina.engine.fused import FusedLayer, Linear, can_fuse
from pastina.engine.pool import Pool
from pastina.engine.postnorm import PostNormLayer
from pastina.engine.prenorm import PreNormLayer
from pastina.engine.sight import EVERYTHING, Rotary, Sight
from pastina.errors import BackboneError
from pastina.methods.biases import bias_parts
from pastina.methods.pasta import PastaLayer
from pastina.methods.pasta_layer import TABLES

_STEADY = {"default", "linear", "yarn"}  # rotary positions that do not change with the longest row


class Parts(NamedTuple):
    """The modules of one layer; projections: query, key and value, or all in one."""

    projections: tuple[Any, ...]
    out: Any
    norm1: Any
    up: Any
    down: Any
    norm2: Any


@dataclass(frozen=True, slots=True)
class Family:
    """What a class of backbones calls its modules, and how its layers are frozen.

    offset: positions count from padding_idx + 1. embeds_ids_alone: its embeddings know no positions
    and no token types.
    """

    layers: str
    parts: Callable[[Any], Parts]
    freeze: Callable[[Any, "Family", Precision], list[FrozenLayer]]
    activation: str = "hidden_act"
    offset: bool = False
    embeds_ids_alone: bool = False


def why_not_frozen(backbone: Any) -> str | None:
    """Why the packed engine cannot run this backbone; None: it can."""
    family = FAMILIES.get(type(backbone).__name__)
    if family is None:
        return f"the backbone is a {type(backbone).__name__}"
    config = backbone.config
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        return "the backbone is a decoder"
    if getattr(config, family.activation) not in ACTIVATIONS:
        return f"the activation {getattr(config, family.activation)!r} is not known"
    rotary = getattr(backbone, "rotary_emb", None)
    if rotary is not None and (others := sorted(set(rotary.rope_type.values()) - _STEADY)):
        return f"rotary positions of the type {others[0]!r} are not known"
    for name, parameter in backbone.named_parameters():
        if any(table in name for table in TABLES):
            continue
        if parameter.requires_grad:
            return f"{name} of the backbone is not frozen"
        if parameter.dtype != torch.float32:
            return f"{name} of the backbone is {parameter.dtype}"
    reasons = (_why_not_layer(family.parts(layer)) for layer in _layers(backbone, family))
    return next(filter(None, reasons), None)


def why_not_shifted(backbone: Any) -> str | None:
    """Why the packed engine, which runs this backbone, cannot give tokens other biases; None: it can."""
    family = FAMILIES[type(backbone).__name__]
    for layer in _layers(backbone, family):
        parts = family.parts(layer)
        wanted = (parts.projections[0], *parts.projections[2:], parts.out, parts.norm1)
        wanted += (parts.up, parts.down, parts.norm2)
        try:
            found = [part.module for part in bias_parts(layer)]
        except BackboneError as error:
            return str(error)
        if family.freeze is not _post_norm or [id(m) for m in found] != [id(m) for m in wanted]:
            return "biases learn of other parts than BERT has"
    return None


def freeze_layers(backbone: Any, precision: Precision) -> list[FrozenLayer]:
    """The backbone's layers, with products in this precision."""
    family = FAMILIES[type(backbone).__name__]
    return family.freeze(backbone, family, precision)


def lowest_layers(backbone: Any, layers: Sequence[FrozenLayer]) -> list[FrozenLayer]:
    """Those of the frozen layers that a copy of their backbone with fewer layers has."""
    own = list(layers[: len(_layers(backbone, FAMILIES[type(backbone).__name__]))])
    if isinstance(own[-1], PreNormLayer):  # the model's last norm stands behind the last layer
        own[-1] = replace(own[-1], last=_norm(backbone.final_norm))
    return own


def _layers(backbone: Any, family: Family) -> list[Any]:
    layers = backbone.get_submodule(family.layers)
    return [layer.base_layer if isinstance(layer, PastaLayer) else layer for layer in layers]


def _why_not_layer(parts: Parts) -> str | None:
    linear = [*parts.projections, parts.out, parts.up, parts.down]
    strange = [m for m in linear if type(m) is not nn.Linear]
    strange += [m for m in (parts.norm1, parts.norm2) if type(m) not in (nn.LayerNorm, nn.Identity)]
    return f"the backbone has a {type(strange[0]).__name__} in its layers" if strange else None


# ---------------------------------------------------------------------------------------------------
# The parts of a layer


def _bert_parts(layer: Any) -> Parts:
    own, attention = layer.attention.self, layer.attention.output
    return Parts(
        projections=(own.query, own.key, own.value),
        out=attention.dense,
        norm1=attention.LayerNorm,
        up=layer.intermediate.dense,
        down=layer.output.dense,
        norm2=layer.output.LayerNorm,
    )


def _distilbert_parts(layer: Any) -> Parts:
    attention = layer.attention
    return Parts(
        projections=(attention.q_lin, attention.k_lin, attention.v_lin),
        out=attention.out_lin,
        norm1=layer.sa_layer_norm,
        up=layer.ffn.lin1,
        down=layer.ffn.lin2,
        norm2=layer.output_layer_norm,
    )


def _modernbert_parts(layer: Any) -> Parts:
    return Parts(
        projections=(layer.attn.Wqkv,),
        out=layer.attn.Wo,
        norm1=layer.attn_norm,
        up=layer.mlp.Wi,
        down=layer.mlp.Wo,
        norm2=layer.mlp_norm,
    )


# ---------------------------------------------------------------------------------------------------
# Freezing: weights are shared with the model, but those of query, key and value, which are copied.


def _post_norm(backbone: Any, family: Family, precision: Precision) -> list[FrozenLayer]:
    config = backbone.config
    activation = getattr(config, family.activation)
    device = next(backbone.parameters()).device
    is_fused = can_fuse(precision, device, activation)
    layers: list[FrozenLayer] = []
    pool = Pool()
    for parts in map(family.parts, _layers(backbone, family)):
        norms = _norm(parts.norm1), _norm(parts.norm2)
        if is_fused and all(isinstance(norm, Norm) for norm in norms):
            layers.append(_fused(parts, config, norms, activation, precision, pool))
            continue
        act = ACTIVATIONS[activation]
        layers.append(
            PostNormLayer(
                attention=_attention(parts, config, EVERYTHING, precision),
                norm1=norms[0],
                ffn=FeedForward(_affine(parts.up, precision), act, _affine(parts.down, precision)),
                norm2=norms[1],
            )
        )
    return layers


def _fused(
    parts: Parts,
    config: Any,
    norms: tuple[Any, Any],
    activation: str,
    precision: Precision,
    pool: Pool,
) -> FusedLayer:
    def linear(module: nn.Linear) -> Linear:
        bias = None if module.bias is None else module.bias.detach()
        return Linear(module.weight.detach(), bias, precision)

    return FusedLayer(
        qkv=Linear(*_projections(parts, config), precision),
        out=linear(parts.out),
        up=linear(parts.up),
        down=linear(parts.down),
        norms=norms,
        activation=activation,
        head_size=config.hidden_size // config.num_attention_heads,
        pool=pool,
    )


def _pre_norm(backbone: Any, family: Family, precision: Precision) -> list[FrozenLayer]:
    config, layers = backbone.config, _layers(backbone, family)
    act = gated(ACTIVATIONS[getattr(config, family.activation)])
    reaches = {"full_attention": None, "sliding_attention": config.local_attention // 2}
    kinds = [layer.attention_type for layer in layers]
    sights = {kind: Sight(reaches[kind], _rotary(backbone.rotary_emb, kind)) for kind in set(kinds)}
    lasts = [NoNorm()] * (len(layers) - 1) + [_norm(backbone.final_norm)]
    return [
        PreNormLayer(
            norm1=_norm(parts.norm1),
            attention=_attention(parts, config, sights[kind], precision),
            norm2=_norm(parts.norm2),
            ffn=FeedForward(_affine(parts.up, precision), act, _affine(parts.down, precision)),
            last=last,
        )
        for parts, kind, last in zip(map(family.parts, layers), kinds, lasts, strict=True)
    ]


def _projections(parts: Parts, config: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of query, key and value as one product, with the scale of attention in queries."""
    size = config.hidden_size
    scale = (size // config.num_attention_heads) ** -0.5
    weight = torch.cat([p.weight.detach() for p in parts.projections])
    weight[:size] *= scale
    if parts.projections[0].bias is None:
        return weight, None
    bias = torch.cat([p.bias.detach() for p in parts.projections])
    bias[:size] *= scale
    return weight, bias


def _attention(parts: Parts, config: Any, sight: Sight, precision: Precision) -> Attention:
    size = config.hidden_size
    weight, bias = _projections(parts, config)

    def rows(which: slice) -> Affine:
        return make_affine(weight[which], None if bias is None else bias[which], precision)

    return Attention(
        qkv=rows(slice(None)),
        query=rows(slice(size)),
        key_value=rows(slice(size, None)),
        out=_affine(parts.out, precision),
        head_size=size // config.num_attention_heads,
        sight=sight,
    )


def _affine(linear: nn.Linear, precision: Precision) -> Affine:
    bias = None if linear.bias is None else linear.bias.detach()
    return make_affine(linear.weight.detach(), bias, precision)


def _norm(norm: nn.LayerNorm | nn.Identity) -> Norm | NoNorm:
    if isinstance(norm, nn.Identity):
        return NoNorm()
    return Norm(norm.weight.detach(), None if norm.bias is None else norm.bias.detach(), norm.eps)


def _rotary(module: Any, kind: str) -> Rotary:
    speed_C = getattr(module, f"{kind}_inv_freq").detach().clone()
    return Rotary(speed_C, getattr(module, f"{kind}_attention_scaling"))


_BERT = Family("encoder.layer", _bert_parts, _post_norm)
_ROBERTA = Family("encoder.layer", _bert_parts, _post_norm, offset=True)
FAMILIES: dict[str, Family] = {
    "BertModel": _BERT,
    "ElectraModel": _BERT,
    "RobertaModel": _ROBERTA,
    "XLMRobertaModel": _ROBERTA,
    "CamembertModel": _ROBERTA,
    "DistilBertModel": Family(
        "transformer.layer", _distilbert_parts, _post_norm, activation="activation"
    ),
    "ModernBertModel": Family(
        "layers",
        _modernbert_parts,
        _pre_norm,
        activation="hidden_activation",
        embeds_ids_alone=True,
    ),
}

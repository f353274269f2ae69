"""Adapters with large random numbers, saved as training saves them, and backbones of more families."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AlbertConfig,
    AutoModel,
    DebertaV2Config,
    ElectraConfig,
    MPNetConfig,
    PreTrainedConfig,
)

from pastina import adapter as module
from pastina.adapter import BackboneId, Card, save_adapter
from pastina.backbones import load_backbone
from pastina.files import CARD
from pastina.heads import TaskModel
from pastina.kinds import KINDS
from pastina.methods import attach
from pastina.recipe import BackboneSpec, PastaOptions
from pastina.slots import special_ids, template_slots
from tests import backbone_folder
from tests.backbone_folder import save_backbone

LONG = "we need plum and nail today thanks please send me a hammer and the fig now"


def family_folder(name: str, folder: Path) -> Path:
    """Like `save_backbone`, for electra, albert, mpnet and deberta as well."""
    if name not in _CONFIGS:
        return save_backbone(name, folder)
    make = backbone_folder._bytes if name == "mpnet" else backbone_folder._word_pieces
    tokenizer = make("roberta" if name == "mpnet" else "bert")
    torch.manual_seed(3)
    model: Any = AutoModel.from_config(_CONFIGS[name](len(tokenizer)))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


_SIZES: dict[str, Any] = backbone_folder._SIZES
_CONFIGS: dict[str, Any] = {
    "electra": lambda size: ElectraConfig(vocab_size=size, embedding_size=8, **_SIZES),
    # one layer that is called three times
    "albert": lambda size: AlbertConfig(
        vocab_size=size, embedding_size=8, **{**_SIZES, "num_hidden_layers": 3}
    ),
    "mpnet": lambda size: MPNetConfig(vocab_size=size, **_SIZES),
    "deberta": lambda size: _deberta(size),
}


def _deberta(size: int) -> PreTrainedConfig:
    changes: dict[str, Any] = {
        "position_buckets": 8,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
    }
    return DebertaV2Config(
        vocab_size=size,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
        **_SIZES,
        **changes,
    )


def make_adapter(
    backbone: Path,
    folder: Path,
    kind: str = "classify",
    options: Any = None,
    *,
    name: str | None = None,
    labels: Sequence[str] = ("fruit", "tool"),
    pooling: str = "cls",
    is_pair: bool = False,
    max_length: int = 24,
    stride: int = 3,
    seed: int = 0,
    scale: tuple[float, float] = (0.0, 1.0),
    num_layers: int | None = None,
) -> Path:
    """An adapter with random vectors and head, too large to be overlooked. options: None: PASTA."""
    options = options or PastaOptions()
    spec = BackboneSpec(name=str(backbone), num_layers=num_layers)
    loaded = load_backbone(spec, keep_pooler=True)
    labels = () if kind == "regress" else tuple(labels)
    pooling = "tokens" if kind == "tag" else pooling
    num_outputs = len(KINDS[kind].outputs(labels))
    model = attach(
        TaskModel(loaded.model, num_outputs, pooling=pooling),
        options,
        special_token_ids=special_ids(loaded.tokenizer),
        num_slots=template_slots(loaded.tokenizer, is_pair) + getattr(options, "extra_tokens", 0),
        modules_to_save=["classifier"],
        task_type=KINDS[kind].task_type,
    )
    generator = torch.Generator().manual_seed(seed)
    learns = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in learns:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.6)
    files = loaded.files
    card = Card(
        name=name or folder.name,
        kind=kind,  # type: ignore[arg-type]
        labels=labels,
        method=options.name,
        is_pair=is_pair,
        pooling=pooling,
        max_length=max_length,
        stride=stride,
        target_mean=scale[0],
        target_std=scale[1],
        backbone=BackboneId(
            name=files.name,
            revision=None,
            digest=files.digest,
            tokenizer_digest=files.tokenizer_digest,
            config_digest=files.config_digest,
            num_layers=num_layers,
        ),
        trained_parameters=sum(p.numel() for p in learns),
        recipe={},
        versions={},
    )
    save_adapter(model, card, folder)
    return folder


def reseal(folder: Path, **changes: Any) -> Path:
    """Change the card and write the digest that belongs to what the folder holds now."""
    values = json.loads((folder / CARD).read_text()) | changes
    values["digest"] = module.adapter_digest(folder, Card.model_validate(values))
    (folder / CARD).write_text(json.dumps(values))
    return folder

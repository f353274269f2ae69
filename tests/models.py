"""Tiny random models built from config, shared by the tests. Nothing is downloaded."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AutoModel,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    ModernBertConfig,
    MPNetConfig,
    PreTrainedConfig,
    PreTrainedModel,
    RobertaConfig,
    T5Config,
    T5EncoderModel,
    XLMRobertaConfig,
)

from pastina.engine.rounding import make_keys

VOCAB, HIDDEN, LAYERS, HEADS = 120, 16, 3, 2

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
}

# What version 3 sets beside the named fields.
_DEBERTA_V3: dict[str, Any] = {
    "position_buckets": 8,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
}

# Ids that stand for [CLS] and [SEP] in the BERT-like vocabularies, whose configs name none.
CLS, SEP = 101, 102


def bert(**changes: Any) -> BertConfig:
    return BertConfig(**{**_SIZES, **changes})


CONFIGS: dict[str, PreTrainedConfig] = {
    "bert": bert(),
    "roberta": RobertaConfig(**_SIZES),
    "xlm-roberta": XLMRobertaConfig(**_SIZES),
    "electra": ElectraConfig(**_SIZES, embedding_size=8),
    "distilbert": DistilBertConfig(
        vocab_size=VOCAB,
        dim=HIDDEN,
        n_layers=LAYERS,
        n_heads=HEADS,
        hidden_dim=24,
        max_position_embeddings=40,
    ),
    "deberta-v2": DebertaV2Config(
        **_SIZES,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
        **_DEBERTA_V3,
    ),
    "mpnet": MPNetConfig(**_SIZES),
    "albert": AlbertConfig(**_SIZES, embedding_size=8),
    "modernbert": ModernBertConfig(
        **_SIZES,
        pad_token_id=0,
        cls_token_id=CLS,
        sep_token_id=SEP,
        bos_token_id=CLS,
        eos_token_id=SEP,
        local_attention=6,
    ),
    "t5": T5Config(vocab_size=VOCAB, d_model=HIDDEN, num_layers=LAYERS, num_heads=HEADS, d_kv=8),
}

# The special ids of a text: first and separator; T5 has only a separator.
SPECIAL: dict[str, tuple[int, ...]] = {
    name: (0, 2)
    if name in {"roberta", "xlm-roberta", "mpnet"}
    else (2, 3)
    if name == "albert"
    else (1,)
    if name == "t5"
    else (CLS, SEP)
    for name in CONFIGS
}
PAD = {name: 1 if name in {"roberta", "xlm-roberta", "mpnet"} else 0 for name in CONFIGS}


def build(name: str, seed: int = 0) -> PreTrainedModel:
    """A tiny random backbone in eval mode, always the same for a seed."""
    torch.manual_seed(seed)
    config = CONFIGS[name]
    model = (
        T5EncoderModel(config) if isinstance(config, T5Config) else AutoModel.from_config(config)
    )
    for parameter in model.parameters():
        # Initial weights of 0.02 let hardly anything through; larger ones make differences visible.
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def batch(name: str, side: str = "right", seed: int = 1) -> dict[str, Tensor]:
    """Three rows, the middle one a pair, at different lengths and padded on one side."""
    generator = torch.Generator().manual_seed(seed)
    first, last = SPECIAL[name][:-1], SPECIAL[name][-1]
    rows: list[list[int]] = []
    for lengths in ((6,), (2, 3), (4,)):
        row = list(first)
        for length in lengths:
            row += torch.randint(4, 100, (length,), generator=generator).tolist()
            row.append(last)
        rows.append(row)
    width = max(map(len, rows)) + 1
    padded, masks = [], []
    for row in rows:
        pad, zeros = [PAD[name]] * (width - len(row)), [0] * (width - len(row))
        ones = [1] * len(row)
        padded.append(row + pad if side == "right" else pad + row)
        masks.append(ones + zeros if side == "right" else zeros + ones)
    return {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(masks)}


class TinyTask(nn.Module):
    """A backbone inside another module, with a head of its own."""

    def __init__(self, backbone: PreTrainedModel, num_labels: int = 2) -> None:
        super().__init__()
        self.config = backbone.config
        self.bert = backbone
        self.dropout = nn.Dropout(0.1)
        self.classifier = nn.Linear(backbone.config.hidden_size, num_labels)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> dict[str, Tensor]:
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        logits = self.classifier(self.dropout(hidden[:, 0]))
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def task(name: str = "bert", seed: int = 0) -> TinyTask:
    backbone = build(name, seed)
    torch.manual_seed(seed + 100)
    return TinyTask(backbone).eval()


def some_keys(num_rows: int, seed: int = 0) -> Tensor:
    """Of rows, by which int8 gradients are rounded."""
    generator = torch.Generator().manual_seed(seed)
    return make_keys(
        [int(torch.randint(1, 1 << 62, (), generator=generator))],
        [(num_rows, 1)],
        [torch.arange(num_rows)],
        num_rows,
    )

"""Tiny random backbones with real fast tokenizers, saved as a checkpoint is, and toy data for them."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    DistilBertConfig,
    ModernBertConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

TOPICS = {
    "fruit": ("apple", "pear", "plum", "fig"),
    "tool": ("hammer", "saw", "drill", "nail"),
}
FILLERS = ("please", "send", "me", "a", "now", "we", "need", "the", "today", "thanks")
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,!?"
WORDS = [*FILLERS, *(word for words in TOPICS.values() for word in words), "very"]

HIDDEN, LAYERS = 32, 2
_SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 66,
}


def save_backbone(name: str, folder: Path) -> Path:
    """A folder with config.json, model.safetensors and the tokenizer's files.

    name: bert, bert-no-pooler, roberta, distilbert or modernbert.
    """
    tokenizer = _word_pieces(name) if "bert" in name[:4] or name == "distilbert" else _bytes(name)
    torch.manual_seed(3)
    model = _model(name, len(tokenizer), tokenizer)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)  # 0.02 lets hardly anything through
    _give_meaning(model.get_input_embeddings().weight, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _give_meaning(table: torch.Tensor, tokenizer: PreTrainedTokenizerFast) -> None:
    """Words of one topic get something in common, as in a backbone that has learned a language."""
    with torch.no_grad():
        for number, words in enumerate((*TOPICS.values(), ("very",))):
            for word in words:
                ids = tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
                table[ids, 8 * number : 8 * number + 8] += 1.0


def _model(name: str, num_tokens: int, tokenizer: PreTrainedTokenizerFast) -> Any:
    if name.startswith("bert"):
        return BertModel(
            BertConfig(vocab_size=num_tokens, **_SIZES), add_pooling_layer=name == "bert"
        )
    config: PreTrainedConfig
    if name == "roberta":
        config = RobertaConfig(vocab_size=num_tokens, **_SIZES)
    elif name == "distilbert":
        config = DistilBertConfig(
            vocab_size=num_tokens,
            dim=HIDDEN,
            n_layers=LAYERS,
            n_heads=2,
            hidden_dim=48,
            max_position_embeddings=66,
        )
    else:
        vocabulary = tokenizer.get_vocab()
        pad, first, last = (vocabulary[word] for word in ("[PAD]", "[CLS]", "[SEP]"))
        config = ModernBertConfig(
            vocab_size=num_tokens,
            pad_token_id=pad,
            cls_token_id=first,
            bos_token_id=first,
            sep_token_id=last,
            eos_token_id=last,
            **_SIZES,
        )
    return AutoModel.from_config(config)


def _word_pieces(name: str) -> PreTrainedTokenizerFast:
    """BERT's way: lower case, words, pieces that begin with ##."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = [*special, *WORDS, *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    numbers = {word: i for i, word in enumerate(dict.fromkeys(vocabulary))}
    raw = Tokenizer(models.WordPiece(numbers, unk_token="[UNK]"))
    raw.normalizer = normalizers.BertNormalizer()
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    raw.decoder = decoders.WordPiece()
    types = [] if name == "distilbert" else ["token_type_ids"]
    return _wrapped(raw, ["input_ids", *types, "attention_mask"])


def _bytes(name: str) -> PreTrainedTokenizerFast:
    """The way of RoBERTa and ModernBERT: byte-level BPE."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    if name == "modernbert":
        special = ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"]
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator([f"{word} {word}" for word in WORDS] * 3, trainer)
    if name == "roberta":
        raw.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    else:
        raw.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B [SEP]",
            special_tokens=[("[CLS]", 0), ("[SEP]", 2)],
        )
    return _wrapped(raw, ["input_ids", "attention_mask"], special)


def _wrapped(
    raw: Tokenizer, inputs: list[str], special: list[str] | None = None
) -> PreTrainedTokenizerFast:
    first, pad, last, unknown, mask = special or ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"]
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        model_input_names=inputs,
        cls_token=first,
        bos_token=first if first == "<s>" else None,
        eos_token=last if last == "</s>" else None,
        sep_token=last,
        pad_token=pad,
        unk_token=unknown,
        mask_token=mask,
    )


def toy_rows(kind: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows that a frozen random backbone can learn to tell apart; every label stands in each ten."""
    draw = random.Random(f"{kind} {seed}")
    return [_ROWS[kind](draw, number) for number in range(count)]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The rows as JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _fillers(draw: random.Random, count: int) -> list[str]:
    return [draw.choice(FILLERS) for _ in range(count)]


def _classify(draw: random.Random, number: int) -> dict[str, Any]:
    label = list(TOPICS)[number % 2]
    words = [*_fillers(draw, 3), draw.choice(TOPICS[label]), *_fillers(draw, draw.randint(0, 3))]
    return {"text": " ".join(words), "label": label}


def _pair(draw: random.Random, number: int) -> dict[str, Any]:
    row = _classify(draw, number)
    return {"text": " ".join(_fillers(draw, 3)), "text_pair": row["text"], "label": row["label"]}


def _multilabel(draw: random.Random, number: int) -> dict[str, Any]:
    labels = [name for i, name in enumerate(TOPICS) if number >> i & 1]
    words = [*_fillers(draw, 3), *(draw.choice(TOPICS[label]) for label in labels)]
    draw.shuffle(words)
    return {"text": " ".join(words), "labels": labels}


def _regress(draw: random.Random, number: int) -> dict[str, Any]:
    count = number % 5
    return {"text": " ".join([*_fillers(draw, 2), *["very"] * count]), "score": 10.0 + 3.0 * count}


def _tag(draw: random.Random, number: int) -> dict[str, Any]:
    text, spans = "", []
    for label in draw.sample(list(TOPICS), number % 3):
        text += " ".join(_fillers(draw, 2)) + " "
        word = draw.choice(TOPICS[label])
        spans.append({"start": len(text), "end": len(text) + len(word), "label": label})
        text += word + " "
    return {"text": text + "thanks", "spans": spans}


_ROWS = {
    "classify": _classify,
    "pair": _pair,
    "multilabel": _multilabel,
    "regress": _regress,
    "tag": _tag,
}


def toy_recipe(
    backbone: Path,
    folder: Path,
    kind: str = "classify",
    *,
    rows: int = 40,
    dev_rows: int = 20,
    **sections: Any,
) -> Any:
    """A recipe on toy data, which is written into the folder; keywords are sections of the recipe."""
    from pastina.recipe import make_recipe

    train = write_rows(folder / f"{kind}-train.jsonl", toy_rows(kind, rows))
    dev = write_rows(folder / f"{kind}-dev.jsonl", toy_rows(kind, dev_rows, seed=1))
    data = {"train": str(train), "dev": str(dev), "test": str(dev), "max_length": 32, "stride": 4}
    fit = {"epochs": 3, "batch": 8}
    values: dict[str, Any] = {
        "kind": "classify" if kind == "pair" else kind,
        "backbone": {"name": str(backbone)},
        "data": data | sections.pop("data", {}),
        "fit": fit | sections.pop("fit", {}),
    }
    return make_recipe(values | sections)

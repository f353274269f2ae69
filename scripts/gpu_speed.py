"""Training speed on a GPU: a BERT-large with random weights, rows of 128 tokens.

    .venv/bin/python scripts/gpu_speed.py [--json results/gpu-speed.json] [--batch 32]

Needs a CUDA device. Measures, in turn in one process, examples/s of pastina's own training step in
bf16 against transformers.Trainer with PEFT's LoRA (rank 8) in mixed bf16, over the same rows; and
which share of the card's measured bf16 matrix rate the step for a [CLS] head reaches.
"""

import argparse
import json
import os
import random
import shlex
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import BertConfig, BertModel

from pastina.backbones import find_backbone, load_tokenizer
from pastina.bench.timing import ratio
from pastina.bench.training import TRAINER, in_precision, race, race_floor
from pastina.bench.work import FULL, Size
from pastina.files import whole_file
from pastina.recipe import BackboneSpec, Recipe, make_recipe
from pastina.training.fit import machine, versions

LENGTH = 128
LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}


def write_backbone(folder: Path, shape: dict[str, int]) -> list[str]:
    """A BERT with random weights and the default backbone's tokenizer; returns its whole words."""
    tokenizer = load_tokenizer(find_backbone(BackboneSpec()))
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(tokenizer), **shape)  # pyright: ignore[reportArgumentType]
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sorted(word for word in tokenizer.get_vocab() if word.isascii() and word.isalpha())


def write_rows(path: Path, words: list[str], count: int) -> None:
    """Rows that are cut at LENGTH tokens, each with one of two labels."""
    draw = random.Random(path.name)
    with whole_file(path) as file:
        for number in range(count):
            row = {"text": " ".join(draw.choices(words, k=LENGTH)), "label": str(number % 2)}
            file.write(json.dumps(row) + "\n")


def make(folder: Path, shape: dict[str, int], size: Size) -> Recipe:
    """The recipe of a run on such rows."""
    words = write_backbone(folder / "backbone", shape)
    write_rows(folder / "train.jsonl", words, (size.warm_steps + size.steps) * size.batch * 2)
    write_rows(folder / "dev.jsonl", words, 32)
    return make_recipe(
        {
            "backbone": {"name": str(folder / "backbone")},
            "data": {
                "train": str(folder / "train.jsonl"),
                "dev": str(folder / "dev.jsonl"),
                "max_length": LENGTH,
            },
            "head": {"pooling": "cls"},
            "fit": {"batch": size.batch},
        }
    ).resolved()


def measure(size: Size, shape: dict[str, int]) -> dict[str, Any]:
    """Both figures, and what they were made of."""
    with tempfile.TemporaryDirectory(prefix="pastina-gpu-") as name:
        folder = Path(name)
        recipe = make(folder, shape, size)
        own = {"bf16": in_precision(recipe, "bf16")}
        rates = race(own, size, folder, lambda: None, is_bf16=True)
        floor = race_floor(recipe, "bf16", size, folder, lambda: None)
    return {
        "train_gpu_bf16": ratio(rates["bf16"], rates[TRAINER]),
        "train_gpu_bf16_share": ratio(floor["floor"], floor["pastina_bf16"]),
        "repetitions": {
            "train_gpu_bf16": {"unit": "examples/s", **rates},
            "train_gpu_bf16_share": {"unit": "seconds", **floor},
        },
        "shape": shape,
        "size": asdict(size),
        "machine": machine(),
        "versions": versions(),
        "command": shlex.join(sys.argv),
    }


def main() -> None:
    """Measure, print, and write the file that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", type=Path, help="write the result there")
    parser.add_argument("--batch", type=int, default=FULL.batch)
    wanted = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(
            "No CUDA device was found, and this script measures one. Run it where there is one."
        )
    result = measure(replace(FULL, batch=wanted.batch, gemm_rows=8192, steps=30), LARGE)
    print(json.dumps(result, indent=1))
    if wanted.json is not None:
        with whole_file(wanted.json) as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()

"""Many adapters from one: each with vectors and a head of its own, and a valid digest."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from pastina.adapter import adapter_digest, read_card
from pastina.files import CARD, CONFIG, WEIGHTS

CLASSES = tuple(range(2, 11))


def write_copies(
    adapter: Path, folder: Path, count: int, classes: Sequence[int] = CLASSES
) -> list[Path]:
    """Folders of `count` classifiers named task0, task1 ...; `classes`: how many each has, in turn.

    They are for measuring: not fsynced, and without a README.
    """
    card, tensors = read_card(adapter), load_file(adapter / WEIGHTS)
    generator = torch.Generator().manual_seed(0)
    folders = []
    for number in range(count):
        path = folder / f"task{number}"
        path.mkdir(parents=True)
        shutil.copyfile(adapter / CONFIG, path / CONFIG)
        num_labels = classes[number % len(classes)]
        own = {
            name: torch.randn(_shape(name, tensor, num_labels), generator=generator) * 0.02
            for name, tensor in tensors.items()
        }
        save_file(own, path / WEIGHTS, metadata={"format": "pt"})
        new = card.model_copy(
            update={
                "name": path.name,
                "labels": tuple(f"class {i}" for i in range(num_labels)),
                "trained_parameters": sum(tensor.numel() for tensor in own.values()),
                "digest": "",
            }
        )
        new = new.model_copy(update={"digest": adapter_digest(path, new)})
        (path / CARD).write_text(new.model_dump_json(indent=1) + "\n", encoding="utf-8")
        folders.append(path)
    return folders


def _shape(name: str, tensor: torch.Tensor, num_labels: int) -> tuple[int, ...]:
    return (num_labels, *tensor.shape[1:]) if ".classifier." in name else tuple(tensor.shape)

"""One trained task on disk: PEFT's files, the card `task.json` and a README for people.

Never half there (written aside, fsynced, renamed), never pickled, identified by its content.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pastina.backbones import Backbone, load_backbone
from pastina.errors import AdapterError
from pastina.files import CARD, CONFIG, WEIGHTS, fsync, let_read, replace_folder
from pastina.recipe import BackboneSpec, KindName

FORMAT = 1


class BackboneId(BaseModel):
    """Which backbone an adapter belongs to. num_layers: to its lowest so many; None: to all."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    revision: str | None
    digest: str
    tokenizer_digest: str
    config_digest: str
    num_layers: Annotated[int, Field(ge=1)] | None = None


class Card(BaseModel):
    """What `task.json` says about a task.

    labels: class names, or span types. is_pair: it reads two texts. pooling, max_length, stride: how
    texts were read.
    target_mean, target_std: regress only; the head answers in units of target_std.
    digest: SHA-256 over the vectors, the head, PEFT's config and this card.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int = FORMAT
    name: str
    kind: KindName
    labels: tuple[str, ...]
    method: str
    is_pair: bool
    pooling: str
    max_length: int
    stride: int
    target_mean: float = 0.0
    target_std: float = 1.0
    backbone: BackboneId
    trained_parameters: int
    metrics: dict[str, dict[str, float]] = Field(default_factory=dict)
    recipe: dict[str, Any]
    versions: dict[str, str]
    created: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    digest: str = ""


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """A task ready to answer: `model` is the PeftModel around a TaskModel, in eval mode."""

    card: Card
    model: Any
    backbone: Backbone


def save_adapter(model: Any, card: Card, folder: Path) -> Card:
    """Write the adapter; an adapter that stands there is replaced whole. Returns the card as written.

    Raises:
        AdapterError: the trained numbers are not finite.
    """
    _check_finite(
        ((name, p.detach()) for name, p in model.named_parameters() if p.requires_grad), folder
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.new")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        # by its name, not by where it lies on this machine
        model.peft_config["default"].base_model_name_or_path = card.backbone.name
        model.save_pretrained(aside, save_embedding_layers=False)
        card = card.model_copy(update={"digest": adapter_digest(aside, card)})
        (aside / CARD).write_text(card.model_dump_json(indent=1) + "\n", encoding="utf-8")
        (aside / "README.md").write_text(_readme(card, aside), encoding="utf-8")
        for path in aside.iterdir():
            let_read(path)  # a library keeps its file to its owner, and a server may be another one
            fsync(path)
        fsync(aside)
        replace_folder(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return card


@dataclass(frozen=True, slots=True)
class Content:
    """The files of an adapter as they were at one moment: the checked card, the others as bytes."""

    card: Card
    weights: bytes
    config: bytes


def read_card(folder: Path | str) -> Card:
    """The checked card of an adapter; reads no tensor but hashes the files.

    Raises:
        AdapterError: files are missing, unreadable, changed since they were written, or of a
            format that this version does not know.
    """
    return read_content(folder).card


def read_content(folder: Path | str) -> Content:
    """The files of an adapter, each read once, so that what was checked is what is used.

    Raises:
        AdapterError: as `read_card` says.
    """
    folder = Path(folder)
    return check_content(folder, *(_bytes(folder, name) for name in (CARD, WEIGHTS, CONFIG)))


def check_content(folder: Path, text: bytes, weights: bytes, config: bytes) -> Content:
    """These files, found to go together; `folder` is what messages call them.

    Raises:
        AdapterError: as `read_card` says.
    """
    try:
        values = json.loads(text.decode("utf-8"))
        version = values["format"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise AdapterError(f"{folder / CARD} is not a task card ({error}).") from None
    if version != FORMAT:
        raise AdapterError(
            f"{folder / CARD} has format {version!r}; this version of pastina reads format {FORMAT}. "
            "Update pastina, or train the adapter again."
        )
    try:
        card = Card.model_validate(values)
        seen = _digest_of(weights, config, card)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise AdapterError(f"{folder / CARD}: {where}: {first['msg']}.") from None
    except (ValueError, RecursionError) as error:  # half characters, lists in lists without end
        raise AdapterError(f"{folder / CARD} is not a task card ({error}).") from None
    if seen != card.digest:
        raise AdapterError(
            f"{folder} was changed after it was written: its digest is {seen[:12]}, the card says "
            f"{card.digest[:12]}. Copy it again from where it came."
        )
    return Content(card, weights, config)


def _bytes(folder: Path, name: str) -> bytes:
    try:
        return (folder / name).read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise AdapterError(f"{folder} is not an adapter: {name} is missing.") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise AdapterError(f"{folder / name} cannot be read: {error}.") from None


def load_adapter(
    folder: Path | str, *, backbone: str | None = None, loaded: Backbone | None = None
) -> LoadedAdapter:
    """The adapter on its backbone, ready to answer.

    backbone: a folder or hub id instead of the name in the card; its files must be the same ones.
    loaded: a backbone that is in memory already (its model is wrapped, so one adapter at a time).

    Raises:
        AdapterError: broken files, or made for another backbone or tokenizer.
        BackboneError: the backbone cannot be found.
    """
    folder = Path(folder)
    card = read_card(folder)
    if loaded is None:
        is_same = backbone is None or backbone == card.backbone.name
        spec = BackboneSpec(
            name=backbone or card.backbone.name,
            revision=card.backbone.revision if is_same else None,
            num_layers=card.backbone.num_layers,
        )
        loaded = load_backbone(spec, keep_pooler=card.pooling == "pooler")
    check_fits(folder, card, loaded)
    wanted = card.backbone.num_layers
    if wanted not in (loaded.num_layers, getattr(loaded.model.config, "num_hidden_layers", None)):
        raise AdapterError(
            f"{folder} was trained on {card.backbone.name} with {_depth(wanted)}, "
            f"this backbone has {_depth(loaded.num_layers)}. Load it with as many."
        )
    return LoadedAdapter(card, _attach(folder, card, loaded), loaded)


def adapter_folder(path: str | Path) -> Path:
    """The adapter in this folder: the folder itself, or `adapter` in a run's folder."""
    path = Path(path)
    inner = path / "adapter"
    return inner if not (path / "task.json").is_file() and inner.is_dir() else path


def list_adapters(folder: Path | str) -> Iterator[tuple[Path, Card | AdapterError]]:
    """Each adapter below a folder, in order of its path, with its card or what is wrong with it."""
    folder = Path(folder)
    if not folder.is_dir():
        raise AdapterError(f"There is no folder {folder}.")
    for path in sorted(folder.rglob(CARD)):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue  # written aside by somebody at this moment, or left by a crash
        try:
            yield path.parent, read_card(path.parent)
        except AdapterError as error:
            yield path.parent, error


def size_on_disk(folder: Path) -> int:
    """Bytes of all files of an adapter."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def _attach(folder: Path, card: Card, backbone: Backbone) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from pastina.heads import TaskModel
    from pastina.kinds import KINDS
    from pastina.methods import load

    try:
        tensors = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{folder / WEIGHTS} is broken: {error}.") from None
    _check_finite(tensors.items(), folder)
    num_outputs = len(KINDS[card.kind].outputs(card.labels))
    task_model = TaskModel(backbone.model, num_outputs, pooling=card.pooling)
    try:
        model = load(task_model, folder, card.method, tensors)
    except KeyError as error:
        raise AdapterError(f"{folder / WEIGHTS} lacks the tensor {error}. Train again.") from error
    except (ValueError, RuntimeError, TypeError) as error:
        raise AdapterError(f"{folder} does not fit {card.backbone.name}: {error}") from error
    return model.eval()


def check_fits(folder: Path, card: Card, backbone: Backbone) -> None:
    """Nothing, if the adapter was made for this backbone.

    Raises:
        AdapterError: it was made for another one.
    """
    files = backbone.files
    for what, made_for, seen in (
        ("weights", card.backbone.digest, files.digest),
        ("tokenizer", card.backbone.tokenizer_digest, files.tokenizer_digest),
        ("settings (config.json)", card.backbone.config_digest, files.config_digest),
    ):
        if made_for != seen:
            raise AdapterError(
                f"{folder} was trained on {card.backbone.name} with {what} {made_for[:12]}, but "
                f"{files.name} at {files.folder} has {what} {seen[:12]}. "
                "Load it on the backbone it was trained on, or train it again."
            )


def _depth(num_layers: int | None) -> str:
    """How much of a backbone, in words."""
    match num_layers:
        case None:
            return "all layers"
        case 1:
            return "its lowest layer"
        case _:
            return f"its lowest {num_layers} layers"


def _check_finite(tensors: Any, folder: Path) -> None:
    for name, tensor in tensors:
        if tensor.is_floating_point() and not math.isfinite(tensor.float().abs().sum().item()):
            raise AdapterError(
                f"{folder}: {name} holds numbers that are not finite. Train again with a lower rate."
            )


def adapter_digest(folder: Path, card: Card) -> str:
    """The identity of an adapter: SHA-256, in hex, over its vectors, head, settings and card."""
    return _digest_of((folder / WEIGHTS).read_bytes(), (folder / CONFIG).read_bytes(), card)


def _digest_of(weights: bytes, config: bytes, card: Card) -> str:
    digest = hashlib.sha256()
    for content in (weights, config):
        digest.update(hashlib.sha256(content).digest())
    values = card.model_dump(mode="json", exclude={"digest"})
    if values["backbone"]["num_layers"] is None:  # cards that are older than this field
        del values["backbone"]["num_layers"]
    digest.update(json.dumps(values, sort_keys=True).encode())
    return digest.hexdigest()


def _readme(card: Card, folder: Path) -> str:
    """The README of an adapter: what it answers, how good it is, how to load it."""
    rows = [
        f"| {part} | {name} | {value:.4f} |"
        for part, metrics in card.metrics.items()
        for name, value in metrics.items()
    ]
    labels = ", ".join(f"`{label}`" for label in card.labels) or "(a number)"
    size = (folder / WEIGHTS).stat().st_size
    return f"""---
library_name: peft
base_model: {card.backbone.name}
tags: [pastina, {card.method}, {card.kind}]
---
# {card.name}

A {card.kind} task on {_base(card)}, trained with `{card.method}`:
{card.trained_parameters:,} parameters, {size / 1000:.0f} kB.

Labels: {labels}

| part | metric | value |
|---|---|---|
{chr(10).join(rows)}

```python
import pastina

task = pastina.load("path/of/this/folder")
print(task.predict(["a text"]))
```

Digest {card.digest}, made {card.created} with {_versions_line(card)}.
Weights of the backbone: SHA-256 {card.backbone.digest}.
"""


def _base(card: Card) -> str:
    depth = card.backbone.num_layers
    return f"`{card.backbone.name}`" + ("" if depth is None else f" ({_depth(depth)})")


def _versions_line(card: Card) -> str:
    return ", ".join(f"{name} {version}" for name, version in card.versions.items())

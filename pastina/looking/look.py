"""An adapter and some texts in, a `Look` out: the backbone without and with the adapter."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pastina.adapter import Card, adapter_folder, load_adapter, read_card
from pastina.answering import Text, as_row, checked_row
from pastina.backbones import load_backbone
from pastina.data.encode import Example, encode
from pastina.data.rows import Row
from pastina.engine.batching import check_slots, collate
from pastina.errors import AdapterError, DataError
from pastina.heads import TaskModel
from pastina.looking.learned import LearnedStates
from pastina.looking.measure import mean, measure_change, measure_heads
from pastina.looking.places import find_places, slot_names, token_label, token_labels
from pastina.looking.records import Look, Maps, TextLook
from pastina.looking.trace import Tracer
from pastina.methods.pasta import PastaConfig
from pastina.recipe import BackboneSpec
from pastina.slots import special_ids

MAPS = 4  # texts whose attention maps are kept, unless somebody wants more


def look(
    adapter: str | Path,
    texts: Sequence[Text],
    *,
    backbone: str | None = None,
    maps: int = MAPS,
) -> Look:
    """What an adapter changes inside the backbone, on these texts.

    Each text runs alone, without padding, through the frozen backbone and through the backbone with the
    adapter, both with transformers' eager attention in fp32. Texts are cut as for a prediction; the
    windows of a long text that a tagger reads count as texts of their own.

    Args:
        adapter: folder of an adapter, or of the run that made it.
        texts: one or more texts, or pairs for a task that reads pairs.
        backbone: a folder or hub id of the same backbone, instead of the name in the card.
        maps: how many texts, from the first, keep their attention maps (L x H x T x T numbers, twice).

    Raises:
        AdapterError: no such adapter, broken, or of a method that leaves the backbone as it is.
        BackboneError: the backbone cannot be found, or shows no attention.
        DataError: no text, an empty one, a pair where the task reads single texts or the other way
            round, more special tokens written in a text than the task has slots.
    """
    if not isinstance(texts, list | tuple):
        raise DataError(
            f"look takes a list of texts, not {type(texts).__name__}. Write look(adapter, [text])."
        )
    rows = [as_row(text, f"text {i + 1}") for i, text in enumerate(texts)]
    return look_rows(adapter, rows, backbone=backbone, maps=maps)


def look_rows(
    adapter: str | Path, rows: Sequence[Row], *, backbone: str | None = None, maps: int = MAPS
) -> Look:
    """The same for rows."""
    folder = adapter_folder(adapter)
    card = read_card(folder)
    rows = _checked(rows, card, maps)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # the method may change the weights themselves: a second copy stays as it is
    loaded = load_adapter(folder, backbone=backbone)
    files = loaded.backbone.files
    spec = BackboneSpec(name=str(files.folder), num_layers=card.backbone.num_layers)
    plain = load_backbone(spec, keep_pooler=False).model.to(device)
    model = loaded.model.to(device)
    task_model = next(m for m in model.modules() if isinstance(m, TaskModel))
    config = model.peft_config["default"]
    pasta = config if isinstance(config, PastaConfig) else None
    inside = pasta is not None and pasta.at == "keys-values"
    before, after = Tracer(plain, plain), Tracer(model, task_model.backbone, inside=inside)
    states = LearnedStates(model) if pasta is not None else None
    tokenizer = loaded.backbone.tokenizer
    ids = tuple((pasta and pasta.special_token_ids) or special_ids(tokenizer))
    extra_tokens = 0 if pasta is None else pasta.extra_tokens

    examples = _examples(rows, card, tokenizer, extra_tokens)
    if pasta is not None:
        check_slots(examples, rows, ids, pasta.num_slots or 0)
    places = find_places(examples, ids, pasta, before.num_layers)
    tokens = [token_labels(example, tokenizer, extra_tokens) for example in examples]
    names = _names(examples, rows)
    count = places.num_slots, places.num_special
    texts = []
    for at, (example, slots) in enumerate(zip(examples, places.slots, strict=True)):
        inputs = collate([example], tokenizer.pad_token_id, with_targets=False).to(device).inputs
        without, with_adapter = before.run(inputs), after.run(inputs)
        if states is not None:
            states.add(with_adapter, inputs["input_ids"])
        maps_kept = Maps(without.attention_LHTT, with_adapter.attention_LHTT) if at < maps else None
        texts.append(
            TextLook(
                names[at],
                rows[example.row].text,
                rows[example.row].text_pair,
                tokens[at],
                slots,
                example.truncated,
                measure_heads(without.attention_LHTT, slots, *count),
                measure_heads(with_adapter.attention_LHTT, slots, *count),
                measure_change(without, with_adapter, slots.index(1) if 1 in slots else 0),
                maps_kept,
            )
        )
    slots = slot_names(places, tokens)
    num_layers, num_heads = texts[0].before.vertical_LH.shape
    special = [token_label(tokenizer, token) for token in ids]
    return Look(
        name=card.name,
        kind=card.kind,
        method=card.method,
        backbone=card.backbone.name,
        digest=card.digest,
        num_texts=len(texts),
        num_layers=num_layers,
        num_heads=num_heads,
        slots=slots,
        num_special=places.num_special,
        extra_tokens=extra_tokens,
        before=mean(text.before for text in texts),
        after=mean(text.after for text in texts),
        change=mean(text.change for text in texts),
        vectors=states and states.vectors(places, slots, special),
        texts=tuple(text for text in texts if text.maps is not None),
    )


def _checked(rows: Sequence[Row], card: Card, maps: int) -> list[Row]:
    if card.method == "linear":
        raise AdapterError(
            f"The adapter {card.name!r} is a linear probe: it leaves the backbone as it is, so its "
            "attention is the same with and without it. Look at an adapter of another method."
        )
    if not rows:
        raise DataError("There is no text to look at. Give one or more.")
    if maps < 0:
        raise DataError(f"maps is the number of texts that keep their maps; seen {maps}.")
    return [checked_row(row, card) for row in rows]


def _examples(rows: Sequence[Row], card: Card, tokenizer: Any, extra_tokens: int) -> list[Example]:
    return encode(
        rows,
        tokenizer,
        card.kind,
        card.labels,
        max_length=card.max_length,
        stride=card.stride,
        extra_tokens=extra_tokens,
    )


def _names(examples: Sequence[Example], rows: Sequence[Row]) -> list[str]:
    """How each example is called: its row, and which window of it where there are several."""
    owners = [example.row for example in examples]
    names = []
    for number, owner in enumerate(owners):
        name = rows[owner].where or f"text {owner + 1}"
        if owners.count(owner) > 1:
            name += f", window {number - owners.index(owner) + 1}"
        names.append(name)
    return names

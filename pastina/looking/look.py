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
from pastina.looking.measure import SlotStates, mean, measure_change, measure_heads
from pastina.looking.records import Look, Maps, TextLook
from pastina.looking.trace import Tracer
from pastina.methods.pasta import PastaConfig
from pastina.recipe import BackboneSpec
from pastina.slots import rank_special_tokens, special_ids

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
    before, after = Tracer(plain, plain), Tracer(model, task_model.backbone)
    config = model.peft_config["default"]
    if isinstance(config, PastaConfig):
        _check_variant(config, card)
    states = SlotStates(model) if isinstance(config, PastaConfig) else None
    tokenizer = loaded.backbone.tokenizer
    ids = special_ids(tokenizer)
    if isinstance(config, PastaConfig):
        ids = tuple(config.special_token_ids or ids)

    examples = _examples(rows, card, tokenizer)
    if isinstance(config, PastaConfig):
        check_slots(examples, rows, ids, config.num_slots or 0)
    places = [_slots(example, ids) for example in examples]
    num_slots = max(max(slots) for slots in places)
    names = _names(examples, rows)
    texts = []
    for example, slots, name in zip(examples, places, names, strict=True):
        inputs = collate([example], tokenizer.pad_token_id, with_targets=False).to(device).inputs
        without, with_adapter = before.run(inputs), after.run(inputs)
        if states is not None:
            states.add(with_adapter, inputs["input_ids"])
        maps_kept = (
            Maps(without.attention_LHTT, with_adapter.attention_LHTT) if len(texts) < maps else None
        )
        texts.append(
            TextLook(
                name,
                rows[example.row].text,
                rows[example.row].text_pair,
                tuple(token_label(tokenizer, token) for token in example.input_ids),
                tuple(slots),
                example.truncated,
                measure_heads(without.attention_LHTT, slots, num_slots),
                measure_heads(with_adapter.attention_LHTT, slots, num_slots),
                measure_change(without, with_adapter, slots.index(1)),
                maps_kept,
            )
        )
    slot_names = _slot_names(texts, num_slots)
    num_layers, num_heads = texts[0].before.vertical_LH.shape
    return Look(
        name=card.name,
        kind=card.kind,
        method=card.method,
        backbone=card.backbone.name,
        digest=card.digest,
        num_texts=len(texts),
        num_layers=num_layers,
        num_heads=num_heads,
        slots=slot_names,
        before=mean(text.before for text in texts),
        after=mean(text.after for text in texts),
        change=mean(text.change for text in texts),
        vectors=states
        and states.vectors(slot_names, [token_label(tokenizer, token) for token in ids]),
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


def _check_variant(config: PastaConfig, card: Card) -> None:
    """The vectors of some variants are not what a look takes them for."""
    usual = {
        "slots": "all",
        "layer_slots": None,
        "positions": "special",
        "everywhere": False,
        "scale": False,
        "rank": 0,
        "at": "residual",
        "extra_tokens": 0,
    }
    for name, value in usual.items():
        if (seen := getattr(config, name)) != value:
            raise AdapterError(
                f"The adapter {card.name!r} was trained with method.{name} = {seen!r}, which a look "
                "cannot show. Look at one without it."
            )


def _examples(rows: Sequence[Row], card: Card, tokenizer: Any) -> list[Example]:
    return encode(
        rows, tokenizer, card.kind, card.labels, max_length=card.max_length, stride=card.stride
    )


def _slots(example: Example, ids: Sequence[int]) -> list[int]:
    rank_BT, _ = rank_special_tokens(torch.tensor([example.input_ids]), ids)
    return rank_BT[0].tolist()


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


def _slot_names(texts: Sequence[TextLook], num_slots: int) -> tuple[str, ...]:
    """Rank and token, as the first text that has the slot spells it."""
    names: dict[int, str] = {}
    for text in texts:
        for token, slot in zip(text.tokens, text.slots, strict=True):
            names.setdefault(slot, f"{slot} {token}")
    return tuple(names[slot] for slot in range(1, num_slots + 1))


def token_label(tokenizer: Any, token_id: int) -> str:
    """A token as a person reads it; the tokenizer's own spelling where that is no whole character."""
    label = tokenizer.decode([token_id], clean_up_tokenization_spaces=False).strip()
    if not label or "\ufffd" in label:
        label = str(tokenizer.convert_ids_to_tokens(token_id)).strip("Ġ▁")
    return label or "␣"

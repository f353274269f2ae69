"""Which column is the text, its pair and the label: told by the recipe, or found by name."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from pastina.errors import DataError
from pastina.recipe import DataSpec

# A text and the name of its partner.
PAIRS = (
    ("text", "text_pair"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("question", "answer"),
    ("question", "context"),
    ("question1", "question2"),
    ("query", "document"),
    ("query", "passage"),
)
# fmt: off
TEXTS = frozenset((
    "text", "sentence", "sentence1", "question", "question1", "premise", "query", "utterance",
    "content", "message", "body", "comment", "review", "document", "passage",
))
LABELS = {
    "classify": frozenset(("label", "labels", "category", "intent", "class", "target")),
    "multilabel": frozenset((
        "label", "labels", "category", "categories", "class", "classes", "target", "targets",
    )),
    "regress": frozenset(("label", "score", "target", "value", "rating", "similarity")),
}
# fmt: on
TOKENS = frozenset(("tokens", "words"))
TAGS = frozenset(("tags", "ner_tags", "labels"))
SPANS = frozenset(("spans", "entities", "label", "labels"))


@dataclass(frozen=True, slots=True)
class Columns:
    """The names of the columns that matter, as the file spells them."""

    text: str
    text_pair: str | None = None
    label: str | None = None


def find_columns(
    seen: Sequence[str], kind: str, spec: DataSpec, where: str, labelled: bool = True
) -> Columns:
    """The columns of a table.

    What the recipe names must be there. Whatever it does not name is found by its usual name, upper
    or lower case; a recipe that names only `text` means a single text. More than one candidate is
    an error, never a guess.
    """
    if kind == "tag":
        return _tag_columns(seen, spec, where, labelled)
    label = None
    if labelled:
        label = _named(seen, spec.label, "label", where) or _only(
            seen, _matches(seen, LABELS[kind]), "label", where
        )
    if spec.text is None and spec.text_pair is None:
        text, pair = _text_by_name(seen, where, label)
    else:
        pair = _named(seen, spec.text_pair, "text_pair", where)
        text = _named(seen, spec.text, "text", where) or _only(
            seen, [name for name in _matches(seen, TEXTS) if name != pair], "text", where
        )
    return Columns(text, pair, label)


def _text_by_name(seen: Sequence[str], where: str, label: str | None) -> tuple[str, str | None]:
    partners = {second for _, second in PAIRS}
    found = [name for name in _matches(seen, TEXTS | partners) if name != label]
    if len(found) == 2:
        first, second = (name.strip().lower() for name in found)
        if (first, second) in PAIRS:
            return found[0], found[1]
        if (second, first) in PAIRS:
            return found[1], found[0]
    return _only(seen, found, "text", where), None


def _tag_columns(seen: Sequence[str], spec: DataSpec, where: str, labelled: bool) -> Columns:
    text = _named(seen, spec.text, "text", where)
    label = _named(seen, spec.label, "label", where) if labelled else None
    if not labelled:
        texts = _matches(seen, TOKENS) or _matches(seen, TEXTS)
        return Columns(text or _only(seen, texts, "text", where))
    choices = [
        Columns(first, None, second)
        for texts, labels in ((TOKENS, TAGS), (TEXTS, SPANS))
        for first in ([text] if text else _matches(seen, texts))
        for second in ([label] if label else _matches(seen, labels))
        if first != second
    ]
    if len(set(choices)) == 1:
        return choices[0]
    texts = [name for name in _matches(seen, TOKENS | TEXTS) if name != label]
    labels = [name for name in _matches(seen, TAGS | SPANS) if name != text]
    text = text or _only(seen, texts, "text", where)
    return Columns(text, None, label or _only(seen, labels, "label", where))


def _matches(seen: Sequence[str], names: frozenset[str] | set[str]) -> list[str]:
    return [column for column in seen if column.strip().lower() in names]


def _named(seen: Sequence[str], wanted: str | None, option: str, where: str) -> str | None:
    if wanted is None or wanted in seen:
        return wanted
    same = [column for column in seen if column.strip().lower() == wanted.strip().lower()]
    if len(same) == 1:
        return same[0]
    near = difflib.get_close_matches(wanted, seen, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise DataError(
        f"{where}: there is no column {wanted!r} (data.{option}); "
        f"the columns are {_listed(seen)}.{hint}"
    )


def _only(seen: Sequence[str], found: Sequence[str], option: str, where: str) -> str:
    if len(found) == 1:
        return found[0]
    what = f"more than one column could be the {option}" if found else f"no column is the {option}"
    shown = f"{_listed(found)} (of {_listed(seen)})" if found else _listed(seen)
    raise DataError(
        f"{where}: {what}; seen: {shown}. Set data.{option} to the name of the right one."
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names) or "none"

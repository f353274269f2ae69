"""Rows become token ids and targets; long texts are cut, or seen through windows for tagging.

Tokens come from the tokenizer without its special tokens; these are then put around them as the
tokenizer itself does, by a template read off a probe. So one way to cut serves all tokenizers.

Tagging tokenizes word by word. A word that follows white space in the text is handed over with one
space in front of it: byte-level BPE (RoBERTa, ModernBERT) then sees `Ġword`, as in running text,
without `add_prefix_space`; WordPiece and SentencePiece drop or replace the space.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from pastina.data.rows import Row
from pastina.errors import BackboneError, DataError

CHUNK = 4096  # rows per call of the tokenizer
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Example:
    """What the backbone reads for one row, or for one window of it (tagging).

    row: index of the row. target: class number (classify), 0.0/1.0 per class (multilabel), number
    (regress), tag number per entry of word_index (tag), None where the row has no label.
    word_tokens[i] is the position in input_ids of the first token of the row's word word_index[i];
    both are None unless the kind is tag.
    truncated: something of the text was cut off.
    """

    row: int
    input_ids: list[int]
    token_type_ids: list[int] | None
    target: int | float | list[int] | list[float] | None
    word_tokens: list[int] | None
    word_index: list[int] | None
    truncated: bool


def bio_tags(labels: Sequence[str]) -> list[str]:
    """The IOB2 tags of these span types; the number of a tag is its place here.

    >>> bio_tags(["date", "place"])
    ['O', 'B-date', 'I-date', 'B-place', 'I-place']
    """
    return ["O"] + [f"{prefix}-{label}" for label in labels for prefix in ("B", "I")]


def encode(
    rows: Sequence[Row],
    tokenizer: Any,
    kind: str,
    labels: Sequence[str],
    max_length: int,
    stride: int = 0,
    extra_tokens: int = 0,
) -> list[Example]:
    """The examples of the rows, in order: one each, for tag one per window.

    Args:
        rows: rows of one task; for tag all with words.
        tokenizer: a fast tokenizer of transformers.
        kind: classify, multilabel, regress or tag.
        labels: class names, or span types, in the order of the head.
        max_length: tokens of an example at most, special ones included.
        stride: tag: tokens that two neighbouring windows share.
        extra_tokens: how often the last special token of an example is written again behind it.

    Raises:
        DataError: a row has a label that is not among these, or nothing fits into max_length.
        BackboneError: the tokenizer is not a fast one.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise BackboneError(
            f"{type(tokenizer).__name__} is not a fast tokenizer. Use a backbone that has a "
            "tokenizer.json."
        )
    template = partial(_template, tokenizer, max_length=max_length, extra_tokens=extra_tokens)
    examples: list[Example] = []
    for first in range(0, len(rows), CHUNK):
        chunk = rows[first : first + CHUNK]
        if kind == "tag":
            examples += _encode_words(chunk, first, tokenizer, labels, template(1), stride)
        else:
            examples += _encode_texts(chunk, first, tokenizer, kind, labels, template)
    return examples


@dataclass(frozen=True, slots=True)
class _Template:
    """Special tokens before, between and after the texts, and the token types of all pieces."""

    pieces: tuple[tuple[int, ...], ...]  # special tokens: one piece more than texts
    piece_types: tuple[tuple[int, ...], ...]
    text_types: tuple[int, ...]
    room: int  # tokens of text that fit

    def build(self, texts: Sequence[list[int]]) -> list[int]:
        ids = list(self.pieces[0])
        for text, piece in zip(texts, self.pieces[1:], strict=True):
            ids += text
            ids += piece
        return ids

    def build_types(self, texts: Sequence[list[int]]) -> list[int]:
        types = list(self.piece_types[0])
        for text, kind, piece in zip(texts, self.text_types, self.piece_types[1:], strict=True):
            types += [kind] * len(text)
            types += piece
        return types


_templates: WeakKeyDictionary[Any, dict[tuple[int, int, int], _Template]] = WeakKeyDictionary()


def _template(tokenizer: Any, num_texts: int, max_length: int, extra_tokens: int) -> _Template:
    """Read once from each tokenizer; the ids of its special tokens are taken not to change."""
    own = _templates.setdefault(tokenizer, {})
    key = (num_texts, max_length, extra_tokens)
    if key not in own:
        own[key] = _read_template(tokenizer, *key)
    return own[key]


def _read_template(tokenizer: Any, num_texts: int, max_length: int, extra_tokens: int) -> _Template:
    probe = tokenizer(*(["a"] * num_texts), return_token_type_ids=True)
    pieces: list[list[int]] = [[]]
    piece_types: list[list[int]] = [[]]
    text_types: list[int] = []
    owners = probe.sequence_ids(0)  # None for special tokens
    for place, owner in enumerate(owners):
        token, kind = probe["input_ids"][place], probe["token_type_ids"][place]
        if owner is None:
            pieces[-1].append(token)
            piece_types[-1].append(kind)
        elif owner == len(text_types):  # the first token of the next text
            text_types.append(kind)
            pieces.append([])
            piece_types.append([])
    if len(text_types) != num_texts:
        raise BackboneError(f"{type(tokenizer).__name__} makes no token of the letter 'a'.")
    if extra_tokens:
        if not pieces[-1]:
            raise BackboneError(
                f"{type(tokenizer).__name__} puts no special token behind a text, so there is none to "
                "write again. Leave out extra_tokens."
            )
        pieces[-1] += pieces[-1][-1:] * extra_tokens
        piece_types[-1] += piece_types[-1][-1:] * extra_tokens
    room = max_length - sum(map(len, pieces))
    if room < num_texts:
        raise DataError(
            f"max_length {max_length} leaves no room for text beside the special tokens. Raise it."
        )
    return _Template(
        tuple(map(tuple, pieces)), tuple(map(tuple, piece_types)), tuple(text_types), room
    )


def _has_types(tokenizer: Any) -> bool:
    return "token_type_ids" in tokenizer.model_input_names


def _tokenize(tokenizer: Any, texts: Sequence[Any], *, words: bool = False) -> Any:
    return tokenizer(
        texts,
        is_split_into_words=words,
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # no message about long texts: they are cut here
    )


def _encode_texts(
    rows: Sequence[Row],
    offset: int,
    tokenizer: Any,
    kind: str,
    labels: Sequence[str],
    templates: Callable[[int], _Template],
) -> Iterator[Example]:
    numbers = {name: number for number, name in enumerate(labels)}
    with_types = _has_types(tokenizer)
    inputs = _token_lists(rows, tokenizer)
    made = {n: templates(n) for n in {len(texts) for texts in inputs}}
    for index, (row, texts) in enumerate(zip(rows, inputs, strict=True)):
        template = made[len(texts)]
        sizes = [len(text) for text in texts]
        kept = cut_longest(sizes, template.room)
        texts = [_kept(text, size, row.keep_end) for text, size in zip(texts, kept, strict=True)]
        yield Example(
            row=offset + index,
            input_ids=template.build(texts),
            token_type_ids=template.build_types(texts) if with_types else None,
            target=_target(row, kind, numbers),
            word_tokens=None,
            word_index=None,
            truncated=kept != sizes,
        )


def _token_lists(rows: Sequence[Row], tokenizer: Any) -> list[list[list[int]]]:
    """The tokens of the text of each row, and of its pair where there is one."""
    pairs = [row.text_pair for row in rows if row.text_pair is not None]
    firsts = _tokenize(tokenizer, [row.text for row in rows])["input_ids"]
    seconds = iter(_tokenize(tokenizer, pairs)["input_ids"] if pairs else ())
    return [
        [first] if row.text_pair is None else [first, next(seconds)]
        for row, first in zip(rows, firsts, strict=True)
    ]


def _kept(text: list[int], size: int, is_end: bool) -> list[int]:
    """So many tokens of its start or of its end."""
    return text[len(text) - size :] if is_end else text[:size]


def cut_longest(sizes: Sequence[int], room: int) -> list[int]:
    """How many tokens of one or two texts to keep: the longer one gives first, then both alike.

    >>> cut_longest([10, 3], 8), cut_longest([10, 9], 8)
    ([5, 3], [4, 4])
    """
    if sum(sizes) <= room:
        return list(sizes)
    if len(sizes) == 1:
        return [room]
    first, second = sizes
    short = min(first, second, room // 2)
    return [short, room - short] if first <= second else [room - short, short]


def _target(row: Row, kind: str, numbers: dict[str, int]) -> int | float | list[float] | None:
    label = row.label
    if label is None:
        return None
    if kind == "multilabel" and isinstance(label, tuple):
        chosen = {_number(name, numbers, row) for name in label}
        return [float(number in chosen) for number in range(len(numbers))]
    if kind == "regress" and isinstance(label, float | int):
        return float(label)
    if kind == "classify" and isinstance(label, str):
        return _number(label, numbers, row)
    raise DataError(f"{row.where}: {label!r} is not a label for the kind {kind}.")


def _number(name: str, numbers: dict[str, int], row: Row) -> int:
    if name in numbers:
        return numbers[name]
    raise DataError(
        f"{row.where}: the label {name!r} is not one of the task's ({', '.join(list(numbers)[:8])}"
        f"{' ...' if len(numbers) > 8 else ''})."
    )


def _encode_words(
    rows: Sequence[Row],
    offset: int,
    tokenizer: Any,
    labels: Sequence[str],
    template: _Template,
    stride: int,
) -> Iterator[Example]:
    numbers = {tag: number for number, tag in enumerate(bio_tags(labels))}
    with_types = _has_types(tokenizer)
    batch = _tokenize(tokenizer, [_spaced_words(row) for row in rows], words=True)
    for index, row in enumerate(rows):
        ids, owners = batch["input_ids"][index], batch.word_ids(index)
        tags = None if row.tags is None else [_number(tag, numbers, row) for tag in row.tags]
        for window in _windows(ids, owners, template.room, stride):
            text = [ids[at] for at in window.tokens]
            yield Example(
                row=offset + index,
                input_ids=template.build([text]),
                token_type_ids=template.build_types([text]) if with_types else None,
                target=None if tags is None else [tags[word] for word in window.words],
                word_tokens=[len(template.pieces[0]) + at for at in window.starts],
                word_index=window.words,
                truncated=window.truncated,
            )


def _spaced_words(row: Row) -> list[str]:
    assert row.words is not None, "rows for tagging have words"
    text = row.text
    return [
        f" {text[start:end]}" if start and text[start - 1].isspace() else text[start:end]
        for start, end in row.words
    ]


@dataclass(frozen=True, slots=True)
class _Window:
    tokens: list[int]  # places in the tokens of the row
    words: list[int]  # indices of words that have a token here
    starts: list[int]  # place in `tokens` of the first token of each
    truncated: bool


def _windows(
    ids: Sequence[int], owners: Sequence[int], room: int, stride: int
) -> Iterator[_Window]:
    """Stretches of whole words that together hold every word with a token."""
    words: list[list[int]] = []  # places of the tokens of each word that has any
    for place, owner in enumerate(owners):
        if not words or owners[words[-1][0]] != owner:
            words.append([])
        words[-1].append(place)
    sizes = [min(len(word), room) for word in words]
    if sum(sizes) > room and stride >= room:
        raise DataError(
            f"stride {stride} is not smaller than the {room} tokens of text in a window. "
            "Lower data.stride or raise data.max_length."
        )
    for first, end in _cut(sizes, room, stride):
        inside = [word[:room] for word in words[first:end]]
        starts = [0]
        for word in inside[:-1]:
            starts.append(starts[-1] + len(word))
        yield _Window(
            [place for word in inside for place in word],
            [owners[word[0]] for word in inside],
            starts if inside else [],
            any(len(word) > room for word in words[first:end]),
        )


def _cut(sizes: Sequence[int], room: int, stride: int) -> Iterator[tuple[int, int]]:
    """Ranges of words; neighbours share at most `stride` tokens, and each range goes on further."""
    first = end = 0
    while True:
        used = sum(sizes[first:end])
        while end < len(sizes) and used + sizes[end] <= room:
            used += sizes[end]
            end += 1
        yield first, end
        if end == len(sizes):
            return
        shared, oldest, first = 0, first, end
        while first - 1 > oldest and shared + sizes[first - 1] <= min(stride, room - sizes[end]):
            first -= 1
            shared += sizes[first]


def best_window(windows: Sequence[Example]) -> dict[int, tuple[int, int]]:
    """For each word of a row the window that counts, and its entry there.

    It is the window in which the word has the most tokens on its shorter side; the earlier one
    where two are equal.
    """
    best: dict[int, tuple[int, int, int]] = {}
    for number, window in enumerate(windows):
        last = len(window.input_ids) - 1
        for entry, (word, token) in enumerate(
            zip(window.word_index or (), window.word_tokens or (), strict=True)
        ):
            context = min(token, last - token)
            if word not in best or context > best[word][0]:
                best[word] = (context, number, entry)
    return {word: (number, entry) for word, (_, number, entry) in best.items()}


def stitch(
    windows: Sequence[Example], scores: Sequence[Sequence[T]], num_words: int, missing: T
) -> list[T]:
    """One score per word of a row, out of the scores of its windows.

    scores[w][i] belongs to windows[w].word_index[i]. Words that the tokenizer makes nothing of,
    such as a lone zero-width joiner, get `missing`.
    """
    stitched = [missing] * num_words
    for word, (number, entry) in best_window(windows).items():
        stitched[word] = scores[number][entry]
    return stitched

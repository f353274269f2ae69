"""What a data file becomes: one record per example, and a table of them with its label names."""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Row:
    """One example.

    text, text_pair: the input. For tagging, `words` are the character ranges (start, end) of the
    words in `text`, in order, and `tags` holds one IOB2 tag per word (`None` where unlabelled).
    label: str for classify, a tuple of str for multilabel, float for regress, None where unlabelled.
    where: "file, line 12" of the source, for messages. keep_end: of texts that are too long the start
    is left out instead of the end (not for tagging, which reads all of them).
    """

    text: str
    text_pair: str | None = None
    label: str | float | tuple[str, ...] | None = None
    words: tuple[tuple[int, int], ...] | None = None
    tags: tuple[str, ...] | None = None
    where: str = ""
    keep_end: bool = field(default=False, repr=False)


@dataclass(frozen=True, slots=True)
class Dataset:
    """Rows of one task, split, with the sorted label names of the training part.

    labels: class names (classify, multilabel), span types (tag: without B-/I-), empty for regress.
    digest: SHA-256 over the content of all rows, so that a resumed run can tell that data changed.
    """

    train: Sequence[Row]
    dev: Sequence[Row]
    test: Sequence[Row]
    labels: tuple[str, ...]
    digest: str

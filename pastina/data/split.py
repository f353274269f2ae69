"""Draws a dev part out of the training rows, or fewer training rows, by the seed."""

import random
from collections import defaultdict
from collections.abc import Hashable, Sequence

from pastina.data.rows import Row
from pastina.errors import DataError


def split_dev(
    rows: Sequence[Row], kind: str, share: float, seed: int, count: int | None = None
) -> tuple[list[Row], list[Row]]:
    """Training rows and dev rows, both in the order of the file.

    classify: each class gives its share, and keeps at least one row for training. Other kinds:
    drawn at random. count: so many dev rows, whatever the share.

    Raises:
        DataError: there are too few rows.
    """
    groups = _groups(rows, kind)
    keep = 1 if kind == "classify" else 0
    room = [len(group) - keep for group in groups]
    most = min(len(rows) - 1, sum(room))
    if count is not None and count > most:
        raise DataError(
            f"data.dev_rows is {count}, but {len(rows)} training rows can give {most} at most. Lower it."
        )
    total = count or min(max(1, round(len(rows) * share)), most)
    if total < 1:
        raise DataError(
            f"No dev part can be drawn: {len(rows)} training rows, at most one of each class. "
            "Give more rows, or a dev file."
        )
    dev = _draw(groups, _portions(room, total), random.Random(f"dev {seed}"))
    return [r for i, r in enumerate(rows) if i not in dev], [rows[i] for i in sorted(dev)]


def cut_dev(rows: Sequence[Row], kind: str, count: int | None, seed: int) -> list[Row]:
    """At most `count` dev rows, in the order of the file; classes that are too rare may lose all."""
    if count is None or len(rows) <= count:
        return list(rows)
    groups = _groups(rows, kind)
    sizes = _portions([len(group) for group in groups], count)
    kept = _draw(groups, sizes, random.Random(f"dev {seed}"))
    return [rows[i] for i in sorted(kept)]


def limit_rows(rows: Sequence[Row], kind: str, limit: int | None, seed: int) -> list[Row]:
    """At most `limit` rows, in the order of the file; for classify at least one of each class."""
    if limit is None or len(rows) <= limit:
        return list(rows)
    groups = _groups(rows, kind)
    if limit < len(groups):
        raise DataError(
            f"data.limit is {limit}, but there are {len(groups)} classes. Set it to "
            f"{len(groups)} or more."
        )
    extra = _portions([len(group) - 1 for group in groups], limit - len(groups))
    sizes = [1 + count for count in extra]
    kept = _draw(groups, sizes, random.Random(f"limit {seed}"))
    return [rows[i] for i in sorted(kept)]


def _groups(rows: Sequence[Row], kind: str) -> list[list[int]]:
    """Row numbers by class, or all in one group where the kind has no single class."""
    groups: defaultdict[Hashable, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        groups[row.label if kind == "classify" else None].append(index)
    return list(groups.values())


def _portions(sizes: Sequence[int], total: int) -> list[int]:
    """`total` divided in proportion to the sizes (largest remainders), never above a size."""
    whole = sum(sizes)
    exact = [size * total / whole if whole else 0.0 for size in sizes]
    portions = [int(share) for share in exact]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (portions[i] - exact[i], i))
    for index in by_remainder[: total - sum(portions)]:
        portions[index] += 1
    return portions


def _draw(groups: list[list[int]], sizes: Sequence[int], rng: random.Random) -> set[int]:
    return {i for group, n in zip(groups, sizes, strict=True) for i in rng.sample(group, n)}

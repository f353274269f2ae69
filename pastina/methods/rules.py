"""Which tokens of a row get which vectors of a layer, as plain data that the config says.

Shape letters: S slots, V vectors of a layer.
"""

from collections.abc import Sequence
from typing import NamedTuple

from pastina.errors import RecipeError

SHARE = ("none", "by_token", "all")
SLOTS = ("all", "first", "rest")
POSITIONS = ("special", "first", "random")


class SlotRule(NamedTuple):
    """What decides which token belongs to which slot, and which slots have a vector."""

    special_token_ids: tuple[int, ...]
    num_slots: int  # special tokens that a row may hold
    by_token: bool
    fixed_positions: tuple[int, ...]
    chosen: tuple[int, ...] | None = None  # the slots that have vectors; None: all
    positions: str = "special"
    is_shared: bool = False  # one vector for all slots
    everywhere: bool = False  # the last vector goes to every token

    @property
    def num_columns(self) -> int:
        """How many slots have a vector."""
        return self.num_slots if self.chosen is None else len(self.chosen)

    @property
    def num_vectors(self) -> int:
        """V: how many vectors a layer has."""
        own = len(self.special_token_ids) if self.by_token else self.num_columns
        return (1 if self.is_shared else own) + self.everywhere


def make_rule(
    special_token_ids: Sequence[int],
    num_slots: int,
    *,
    share: str = "none",
    fixed_positions: Sequence[int] = (),
    slots: str | Sequence[int] = "all",
    positions: str = "special",
    everywhere: bool = False,
) -> SlotRule:
    """The rule of a layer.

    Raises:
        RecipeError: `slots` names a slot that there is not, or leaves none.
    """
    return SlotRule(
        tuple(special_token_ids),
        num_slots,
        share == "by_token",
        tuple(fixed_positions),
        chosen_slots(slots, num_slots),
        positions,
        share == "all",
        everywhere,
    )


def chosen_slots(slots: str | Sequence[int], num_slots: int) -> tuple[int, ...] | None:
    """The slots that have vectors, counted from 0; None: all.

    Raises:
        RecipeError: as `make_rule` says.

    >>> chosen_slots("rest", 3), chosen_slots([0], 3), chosen_slots("all", 3)
    ((1, 2), (0,), None)
    """
    if slots == "all":
        return None
    if isinstance(slots, str):
        chosen = (0,) if slots == "first" else tuple(range(1, num_slots))
    else:
        chosen = tuple(sorted(slots))
    if not chosen or chosen[-1] >= num_slots:
        raise RecipeError(
            f"slots={slots if isinstance(slots, str) else list(slots)!r} does not go with "
            f"{num_slots} slots, which are counted from 0 to {num_slots - 1}."
        )
    return chosen

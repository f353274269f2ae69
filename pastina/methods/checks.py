"""Checks of what a method's config is told; each names the setting and what was seen."""

import math
from collections.abc import Callable, Collection
from numbers import Real

from pastina.errors import RecipeError


def check_word(name: str, value: object, known: Collection[str]) -> None:
    """Nothing, if the value is one of the known words."""
    if not isinstance(value, str) or value not in known:
        raise RecipeError(f"{name} must be one of {', '.join(known)}; seen {value!r}.")


def check_number(name: str, value: object, what: str, fits: Callable[[float], bool]) -> None:
    """Nothing, if the value is a finite number that fits; what: such as "a number from 1"."""
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    if not (math.isfinite(number) and fits(number)):
        raise RecipeError(f"{name} must be {what}; seen {value!r}.")


def check_whole(name: str, value: object, least: int, most: int | None = None) -> None:
    """Nothing, if the value is a whole number in these bounds."""
    if type(value) is not int or value < least or (most is not None and value > most):
        to = "" if most is None else f" to {most}"
        raise RecipeError(f"{name} must be a whole number from {least}{to}; seen {value!r}.")


def check_flag(name: str, value: object) -> None:
    """Nothing, if the value is true or false."""
    if type(value) is not bool:
        raise RecipeError(f"{name} must be true or false; seen {value!r}.")


def checked_integers(name: str, values: object, least: int | None) -> tuple[int, ...]:
    """The different whole numbers of a list, none below `least`."""
    items = _items(values)
    whole = [item for item in items if type(item) is int]
    if not whole or len(whole) < len(items) or len(set(whole)) < len(whole):
        raise RecipeError(f"{name} must be a list of different whole numbers; seen {values!r}.")
    if least is not None and min(whole) < least:
        raise RecipeError(f"{name} must not hold a number below {least}; seen {whole}.")
    return tuple(whole)


def checked_names(name: str, values: object, what: str) -> tuple[str, ...]:
    """The names in a list; what: such as "layer names"."""
    items = _items(values)
    found = [item for item in items if isinstance(item, str) and item]
    if not found or len(found) < len(items):
        seen = f"the text {values!r}" if isinstance(values, str) else repr(values)
        raise RecipeError(f"{name} must be a list of {what}; seen {seen}.")
    return tuple(found)


def checked_heads(values: object) -> list[str] | None:
    """The names of the modules that learn in full. PEFT would take a text letter by letter."""
    if values is None or values == []:
        return None
    return list(checked_names("modules_to_save", values, "module names"))


def _items(values: object) -> list[object]:
    return list(values) if isinstance(values, list | tuple | set | range) else []

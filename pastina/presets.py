"""Settings of a recipe that go by a name; what a recipe says itself goes before them."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from pastina.nearest import nearest

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    # One more vector in each layer, for every token; the [SEP] of a pair share theirs. At most a tenth
    # of the numbers of LoRA with r = 8. Found on dev of the eight sets: docs/benchmark.md.
    "pasta-wide": {
        "method": {"name": "pasta", "share": "by_token", "everywhere": True},
        "fit": {
            "lr": 3e-2,
            "epochs": 15,
            "warmup": 0.3,
            "schedule": "cosine",
        },
    },
    # The same with products of rank 2, for taggers with hundreds of rows: a fifth of LoRA's numbers.
    "pasta-tagger": {
        "method": {"name": "pasta", "share": "by_token", "everywhere": True, "rank": 2},
        "fit": {
            "lr": 3e-2,
            "rank_lr": 1e-2,
            "epochs": 40,
            "warmup": 0.3,
            "schedule": "cosine",
        },
    },
}


def with_preset(values: Mapping[str, Any]) -> dict[str, Any]:
    """Plain nested values with those of their preset below them.

    Raises:
        ValueError: there is no such preset; it is of another method.
    """
    name = values["preset"]
    if not isinstance(name, str) or name not in PRESETS:
        near = nearest(str(name), list(PRESETS))
        hint = f"did you mean {near!r}?" if near else f"known: {', '.join(PRESETS)}"
        raise ValueError(f"unknown preset {name!r}; {hint}")
    preset = PRESETS[name]
    given = {key: _plain(values.get(key, {})) for key in preset}
    own = preset["method"]["name"]
    if (method := given["method"].get("name", own)) != own:
        raise ValueError(
            f"the preset {name!r} is one of {own}, but the method is {method}; leave one out"
        )
    return {**values, **{key: {**below, **given[key]} for key, below in preset.items()}}


def _plain(section: Any) -> Mapping[str, Any]:
    if isinstance(section, BaseModel):
        return section.model_dump(exclude_unset=True)
    if not isinstance(section, Mapping):
        raise ValueError(f"beside a preset a section must be a table, not {section!r}")
    return section

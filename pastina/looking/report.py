"""The page of a look: one HTML file with its style, its script and its numbers inside."""

import base64
import hashlib
import html
import json
import re
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pastina.files import whole_file
from pastina.looking.records import Look, Maps, plain

_SCRIPTS = ("base.js", "charts.js", "attention.js", "main.js")
MAX_WEIGHTS = 8_000_000  # of all maps in a page, both sides; each takes 2.7 bytes there


def write_page(look: Look, path: Path) -> Path:
    """Write the page; returns its path."""
    with whole_file(path) as file:
        file.write(page(look))
    return path


def page(look: Look) -> str:
    """The HTML of a look.

    It loads nothing, and its own script alone may run: the policy in its head names the digest of that
    script. Texts stand in it as JSON, in which no character can end the element around it.
    """
    script = "\n".join(_part(name) for name in _SCRIPTS)
    script = f'"use strict";\n(() => {{\n{script}}})();\n'
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    parts = {
        "title": html.escape(f"{look.name}: what changes inside the backbone"),
        "hash": f"sha256-{digest}",
        "style": _part("page.css").strip(),
        "data": _json(page_data(look)),
        "script": script,
    }
    # in one pass: what is put in is not searched for places again
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], _part("page.html"))


def page_data(look: Look) -> dict[str, Any]:
    """What the page is given: the numbers, with the maps packed, as many as fit."""
    room = MAX_WEIGHTS
    values = plain(replace(look, texts=()))
    for text in look.texts:
        record = plain(replace(text, maps=None))
        size = 2 * text.maps.before_LHTT.numel() if text.maps else 0
        is_kept = text.maps is not None and size <= room
        room -= size if is_kept else 0
        values["texts"].append(record | {"maps": _packed(text.maps) if is_kept else None})
    return values


def _packed(maps: Maps | None) -> dict[str, str]:
    assert maps is not None
    return {"before": _sixteen_bits(maps.before_LHTT), "after": _sixteen_bits(maps.after_LHTT)}


def _sixteen_bits(weights: Tensor) -> str:
    whole = (weights.double().clamp(0, 1) * 65535).round().to(torch.int32)
    return base64.b64encode(whole.numpy().astype("<u2").tobytes()).decode()


def _json(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def _part(name: str) -> str:
    return (resources.files("pastina.looking") / "page" / name).read_text(encoding="utf-8")

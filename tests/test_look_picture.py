"""The picture of a look: whole files that say what they show, whatever stands in the texts."""

import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from PIL import Image

from pastina.errors import PastinaError
from pastina.looking.look import look
from pastina.looking.records import Look
from pastina.recipe import FullOptions, PastaOptions
from tests.adapter_folder import LONG, make_adapter


@pytest.fixture(scope="module")
def seen(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Look:
    folder = tmp_path_factory.mktemp("seen") / "a"
    make_adapter(bert, folder, name="$a_b$ <i> & \x0b 日本", max_length=60)
    return look(folder, ["we need $x^2$ \x0b 日本 </svg> & a plum", LONG])


def test_svg_has_words_for_those_who_do_not_see_it(seen: Look, tmp_path: Path) -> None:
    path = seen.save_picture(tmp_path / "a.svg")
    root = ET.parse(path).getroot()
    tags = {element.tag.rpartition("}")[2]: element for element in root.iter()}
    assert {"svg", "title", "desc"} <= set(tags)
    assert "script" not in tags
    written = "".join(tags["desc"].itertext())
    count = float(seen.after.vertical_LH.sum())
    assert f"without the adapter, {count:.1f} with it" in written
    assert "$a_b$ <i> & \ufffd 日本" in "".join(root.itertext())
    assert [p.name for p in tmp_path.iterdir()] == ["a.svg"]


def test_png(seen: Look, tmp_path: Path) -> None:
    with Image.open(seen.save_picture(tmp_path / "a.png")) as image:
        assert image.format == "PNG"
        assert image.width == 1440


VARIANTS = {
    "wide": (PastaOptions(share="by_token", everywhere=True, rank=2), ("every token", "product")),
    "scale": (PastaOptions(scale=True), ("scale, 1 [CLS]", "scale, 2 [SEP]", "what is learned")),
    "extra": (PastaOptions(extra_tokens=6), ("8 [SEP]+6", "on both sides: 6")),
    "many": (PastaOptions(extra_tokens=20), ("11 [SEP]+9", "and 11 more")),
    "layers": (PastaOptions(layer_slots=(1, 0)), ("1 [CLS]", "2 [SEP]")),
    "ordinary": (PastaOptions(positions="first"), ("ordinary 2", "Attention on tokens")),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant: str, bert: Path, tmp_path: Path) -> None:
    options, words = VARIANTS[variant]
    folder = make_adapter(bert, tmp_path / "a", "classify", options, max_length=60)
    found = look(folder, ["we need a plum now"])
    root = ET.parse(found.save_picture(tmp_path / "a.svg")).getroot()
    written = " ".join(root.itertext())
    for word in words:
        assert word in written
    assert found.vectors is not None
    assert found.vectors.about in written
    assert found.save_picture(tmp_path / "a.png").stat().st_size > 10_000


def test_without_maps_and_without_vectors(bert: Path, tmp_path: Path) -> None:
    folder = make_adapter(bert, tmp_path / "full", "classify", FullOptions())
    found = look(folder, ["a plum"], maps=0)
    path = found.save_picture(tmp_path / "a.svg")
    assert "mean over heads and tokens" in path.read_text(encoding="utf-8")


def test_refusals(seen: Look, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PastinaError, match=r"a\.gif: a picture is a \.png or a \.svg"):
        seen.save_picture(tmp_path / "a.gif")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises((PastinaError, ImportError), match="matplotlib"):
        seen.save_picture(tmp_path / "a.svg")
    assert list(tmp_path.iterdir()) == []

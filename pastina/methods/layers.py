"""Finds the layers of a transformer by what they are, not by a table of architectures."""

import difflib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from pastina.errors import BackboneError
from pastina.methods._peft import Anything


@dataclass(frozen=True, slots=True)
class Layers:
    """Where the layers of a model are: their names, the layer indexes behind each, and their host."""

    names: tuple[str, ...]
    indexes: tuple[tuple[int, ...], ...]
    host_name: str  # the module around them that is given input_ids
    hidden_size: int
    num_layers: int


def find_layers(model: nn.Module, names: Sequence[str] | None = None) -> Layers:
    """The layers of a transformer, wherever they are in `model`.

    The rule: the one ModuleList of blocks of one class that is as long as the config's
    num_hidden_layers. Of an encoder and a decoder the encoder is meant.
    """
    found = tuple(names) if names is not None else _find_names(model)
    modules = dict(model.named_modules())
    for name in found:
        if name not in modules:
            near = difflib.get_close_matches(name, modules, n=3) or list(modules)[1:4]
            raise BackboneError(
                f"target_modules names {name!r}, which {model_name(model)} does not have. "
                f"Near names: {', '.join(near)}."
            )
    host_name = _host_name(modules, found[0])
    config = config_above(modules, found[0])
    if config is None or not isinstance(getattr(config, "hidden_size", None), int):
        raise BackboneError(
            f"No config with a hidden_size was found around {found[0]!r}. PASTA needs the transformers "
            "config on the backbone."
        )
    num_layers = len(found)
    indexes = tuple((i,) for i in range(num_layers))
    if _is_shared(modules, found):
        num_layers = config.num_hidden_layers
        group = [int(i / (num_layers / len(found))) for i in range(num_layers)]
        indexes = tuple(
            tuple(i for i in range(num_layers) if group[i] == g) for g in range(len(found))
        )
    return Layers(found, indexes, host_name, config.hidden_size, num_layers)


def model_name(model: nn.Module) -> str:
    """What to call a model: the type of the transformers model in it, or its own."""
    known = (m for m in model.modules() if isinstance(m, PreTrainedModel))
    return type(next(known, model)).__name__


def token_table(host: Anything) -> nn.Embedding | None:
    """The table of token embeddings of a backbone; None: it has none, or it is not known which."""
    try:
        table = host.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    table = table.get_base_layer() if isinstance(table, BaseTunerLayer) else table
    return table if isinstance(table, nn.Embedding) else None


def keep_layers(model: Anything, num_layers: int) -> None:
    """Leave out all layers above the lowest `num_layers`, none of which is called more than once."""
    found = find_layers(model)
    del model.get_submodule(found.names[0].rpartition(".")[0])[num_layers:]
    model.config.num_hidden_layers = num_layers


_SHARED = "albert_layer_groups"  # ALBERT calls each of these several times


def _is_shared(modules: dict[str, nn.Module], names: Sequence[str]) -> bool:
    return all(name.rpartition(".")[0].endswith(_SHARED) for name in names)


def _find_names(model: nn.Module) -> tuple[str, ...]:
    modules = dict(model.named_modules())
    found: list[str] = []
    for name, module in modules.items():
        config = config_above(modules, name)
        if not isinstance(module, nn.ModuleList) or config is None or len(module) == 0:
            continue
        if any(name.startswith(f"{outer}.") for outer in found):
            continue
        wanted = getattr(config, "num_hidden_layers", None)
        if name.endswith(_SHARED):
            wanted = len(module)
        plain = [m.get_base_layer() if isinstance(m, BaseTunerLayer) else m for m in module]
        if len(module) == wanted and all(type(m) is type(plain[0]) for m in plain):
            found.append(name)
    if len(found) > 1:
        encoders = [name for name in found if "encoder" in name.split(".")]
        found = encoders or found
    if len(found) != 1:
        seen = ", ".join(found) or "none"
        raise BackboneError(
            f"The layers of {model_name(model)} were not found: seen {len(found)} lists of "
            f"num_hidden_layers equal blocks ({seen}). Name the layers in order by "
            'target_modules=["...layer.0", "...layer.1", ...].'
        )
    return tuple(f"{found[0]}.{child}" for child, _ in modules[found[0]].named_children())


def _ancestors(name: str) -> Iterator[str]:
    while name:
        name = name.rpartition(".")[0]
        yield name


def config_above(modules: dict[str, nn.Module], name: str) -> Anything:
    for above in _ancestors(name):
        config = modules[above].__dict__.get("config")
        if hasattr(config, "num_hidden_layers"):
            return config
    return None


def _host_name(modules: dict[str, nn.Module], layer_name: str) -> str:
    above = list(_ancestors(layer_name))
    for name in above:
        if "input_ids" in inspect.signature(modules[name].forward).parameters:
            return name
    return next((name for name in above if "config" in modules[name].__dict__), "")

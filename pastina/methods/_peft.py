"""The one seam to PEFT's internals: an outside method becomes a citizen of PEFT.

PEFT's own `register_peft_method` knows only its closed enum, so the type is a plain string key in
the mapping dicts (members of a str-enum hash like their text). When PEFT changes, this file changes.
"""

import copy
import difflib
import warnings
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

from peft import PeftConfig
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import Tensor, nn

from pastina.errors import AdapterError, DataError, PastinaError, RecipeError

Anything = Any  # for arguments that are only passed on; `Any` lives in this file alone
NO_ADAPTER = "__base__"  # PEFT's word for a row that wants the backbone alone
NO_TARGETS = DUMMY_TARGET_MODULES  # PEFT's word for a method that wraps no layer


def register(peft_type: str, config_cls: type[PeftConfig], tuner_cls: type[BaseTuner]) -> None:
    """Make PEFT know a method.

    Raises:
        PastinaError: PEFT, or another package, already has a method of this name.
    """
    configs = cast(dict[str, Any], PEFT_TYPE_TO_CONFIG_MAPPING)  # typed for the enum alone
    tuners = cast(dict[str, Any], PEFT_TYPE_TO_TUNER_MAPPING)
    prefixes = cast(dict[str, Any], PEFT_TYPE_TO_PREFIX_MAPPING)
    other = configs.get(peft_type)
    if other is not None and _name(other) != _name(config_cls):
        raise PastinaError(
            f"PEFT already has a method {peft_type!r}: {_name(other)}. pastina would silently replace "
            "it. Use a version of PEFT below 0.22, or leave out the package that registers it."
        )
    configs[peft_type], tuners[peft_type], prefixes[peft_type] = (
        config_cls,
        tuner_cls,
        tuner_cls.prefix,
    )


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


@contextmanager
def per_row_adapters(tuner: BaseTuner, kwargs: dict[str, Any]) -> Iterator[None]:
    """While it is open, our layers and the heads get the `adapter_names` that a forward was given.

    Without this PeftModel.forward drops `adapter_names` and answers with the active adapter.
    """
    names = kwargs.get("adapter_names")
    if names is None:
        yield
        return
    known = [*tuner.peft_config, NO_ADAPTER]
    for name in dict.fromkeys(names):
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.4) or sorted(known)
            raise AdapterError(
                f"There is no adapter {name!r}. Near names: {', '.join(near)}. "
                f"Use {NO_ADAPTER!r} for a row without adapter."
            )
    ids = kwargs.get("input_ids")
    if isinstance(ids, Tensor):
        check_row_names(names, len(ids))
    handles = [
        module.register_forward_pre_hook(partial(_pass_names, names), with_kwargs=True)
        for module in tuner.modules()
        if isinstance(module, tuner.tuner_layer_cls | AuxiliaryTrainingWrapper)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _pass_names(names: list[str], module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    return args, {**kwargs, "adapter_names": names}


@contextmanager
def quiet() -> Iterator[None]:
    """While it is open, PEFT does not warn of norms, which it takes for unknown layers, nor of tensors
    that a file lacks, which is an error of ours.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Unsupported layer type .*Norm", UserWarning)
        warnings.filterwarnings("ignore", "Found missing adapter keys", UserWarning)
        yield


def known_types() -> dict[str, type[PeftConfig]]:
    """The config class of each type that PEFT knows, ours included."""
    configs = cast(dict[Any, Any], PEFT_TYPE_TO_CONFIG_MAPPING)
    return {str(getattr(key, "value", key)): value for key, value in configs.items()}


def type_of(config: PeftConfig) -> str:
    """PEFT's name of the method."""
    return str(getattr(config.peft_type, "value", config.peft_type))


def with_heads(config: PeftConfig, heads: list[str] | None) -> PeftConfig:
    """The config of a method that may have no field for heads: they learn and are stored all the same.

    A file does not hold what is no field; who loads one must call this again.
    """
    given: Any = config
    if getattr(given, "modules_to_save", None) is None:
        given.modules_to_save = heads
    return config


def is_prefix(config: PeftConfig) -> bool:
    """Whether a method makes keys and values, of those that stand in front of the text."""
    return type_of(config) in ("PREFIX_TUNING", "CARTRIDGE")


def switch_heads(model: nn.Module, is_on: bool) -> None:
    """Let the heads that learn with an adapter answer, or those that were there before."""
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            module.enable_adapters(is_on)


def check_row_names(names: Sequence[str], num_rows: int) -> None:
    """Nothing, if there is one adapter name per row."""
    if len(names) != num_rows:
        raise DataError(
            f"adapter_names has {len(names)} names, the batch has {num_rows} rows. "
            f"Give one name per row, {NO_ADAPTER!r} for none."
        )


def check_heads(model: nn.Module, modules_to_save: Sequence[str] | None) -> None:
    """Nothing, if a module answers to one of the names, or none was asked for.

    PEFT ignores a name that fits nothing. Not every name must fit: PEFT itself adds "classifier" and
    "score" for some task types.
    """
    if not modules_to_save:
        return
    names = [name for name, _ in model.named_modules() if name]
    if not any(name.endswith(wanted) for name in names for wanted in modules_to_save):
        children = [name for name, _ in model.named_children()]
        raise RecipeError(
            f"modules_to_save={list(modules_to_save)} fits no module of {type(model).__name__}. "
            f"Its parts are: {', '.join(children)}."
        )


def check_file(expected: dict[str, Tensor], found: dict[str, Tensor], what: str) -> None:
    """Nothing, if an adapter file holds each expected tensor in its shape, and PEFT would load it.

    PEFT itself leaves a missing tensor at its random start.
    """
    missing = sorted(expected.keys() - found.keys())
    if missing:
        raise AdapterError(
            f"The adapter file lacks {len(missing)} of {len(expected)} {what}, first {missing[0]!r}. "
            "It was made for another backbone or other settings, or it is damaged."
        )
    for key, tensor in expected.items():
        if tensor.shape != found[key].shape:
            raise AdapterError(
                f"{key!r} has the shape {tuple(found[key].shape)} in the adapter file, this model "
                f"needs {tuple(tensor.shape)}. Load the adapter on the backbone it was made for."
            )


class HeadOnlyTuner(BaseTuner):
    """Base of the methods that wrap no layer of the backbone."""

    tuner_layer_cls = BaseTunerLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  # PEFT's name and type

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("a method without target modules has nothing to replace")

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        with per_row_adapters(self, kwargs):
            yield


class WrappingLayer(nn.Module, BaseTunerLayer):
    """Base of the layers that stand around one module of the backbone and keep it as it is."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._disable_adapters = False
        self.merged_adapters = []

    @property
    def wrapped(self) -> Any:
        """The module inside, as transformers made it."""
        return self.get_base_layer()

    @abstractmethod
    def update_layer(self, adapter_name: str, config: PeftConfig) -> None:
        """Add the parameters of an adapter that has not learned yet."""

    def running(self, known: Iterable[str]) -> list[str]:
        """The adapters among those known to this layer that act on what passes through it now."""
        if self.disable_adapters or self.merged:
            return []
        return [name for name in self.active_adapters if name in known]


class WrappingTuner(BaseTuner):
    """Base of the methods that put a WrappingLayer around each target module."""

    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  # PEFT's name and type

    @abstractmethod
    def wrap(self, target: nn.Module, name: str, config: PeftConfig) -> WrappingLayer:
        """The layer around this module, without adapters."""

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        # What is found in this model is written into our own copy: the user may want to put the same
        # config on another model.
        self.peft_config[adapter_name] = copy.copy(self.peft_config[adapter_name])
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if not isinstance(target, WrappingLayer):
            target = self.wrap(target, current_key, peft_config)
            target.train(self.training)
            setattr(parent, target_name, target)
        target.update_layer(adapter_name, peft_config)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        setattr(parent, child_name, new_module)  # PEFT's own version moves weights about

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            # PeftModel.forward would drop the names and answer with the active adapter.
            raise AdapterError(
                f"{type(self).__name__} has one adapter for a whole batch; adapter_names names one for "
                "each row. Use set_adapter, and a batch for each adapter."
            )
        yield

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        own = f".{cls.prefix}"
        expected = {
            key: tensor
            for key, tensor in model.state_dict().items()
            if own in key and adapter_name in key.rpartition(own)[2].split(".")
        }
        check_file(expected, remapped, "tensors")
        return remapped

"""PASTA: a learned vector is added to every special token at the input of every layer.

Yang et al., "Parameter-Efficient Tuning with Special Token Adaptation", arXiv 2210.04382:

    h~_i = h_i + dropout(e_p(i))  where token i is the p-th special token of its row, h_i elsewhere
"""

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from pastina.errors import BackboneError, RecipeError
from pastina.methods._peft import (
    Anything,
    check_file,
    check_heads,
    per_row_adapters,
    register,
)
from pastina.methods.layers import config_above, find_layers, token_table
from pastina.methods.pasta_config import PastaConfig as PastaConfig
from pastina.methods.pasta_layer import TABLES, cannot_merge
from pastina.methods.pasta_layer import PastaLayer as PastaLayer
from pastina.methods.placement import SlotContext
from pastina.slots import resolve_slots


class PastaModel(BaseTuner):
    """A model whose layers are PastaLayers."""

    prefix = "pasta_"
    tuner_layer_cls = PastaLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  # PEFT's name and type

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Anything, **kwargs: Anything
    ) -> None:
        # What is found in this model is written into our own copy: the user may want to put the same
        # config on another model.
        self.peft_config[adapter_name] = copy.copy(self.peft_config[adapter_name])
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        assert isinstance(peft_config, PastaConfig)
        check_heads(self.model, peft_config.modules_to_save)
        layers = find_layers(self.model, peft_config.target_modules)
        host = self.model.get_submodule(layers.host_name)
        for name in ("layers", "bias_layers"):
            named = getattr(peft_config, name) or ()
            if wrong := [i for i in named if i >= layers.num_layers]:
                raise RecipeError(
                    f"{name}={list(named)} names layer {wrong[0]}, but the model has "
                    f"{layers.num_layers} layers (0 to {layers.num_layers - 1})."
                )
        slots = peft_config.layer_slots
        if slots is not None and len(slots) != layers.num_layers:
            raise RecipeError(
                f"layer_slots names {len(slots)} slots, but the model has {layers.num_layers} layers. "
                "Name one slot for each."
            )
        takes_ids = "input_ids" in inspect.signature(host.forward).parameters
        if not takes_ids and peft_config.fixed_positions is None:
            raise BackboneError(
                f"{type(host).__name__} takes no input_ids, so it has no special tokens to find. Name "
                "the positions of the slots, such as PastaConfig(fixed_positions=[0])."
            )
        if peft_config.fixed_positions is not None and peft_config.special_token_ids is None:
            peft_config.num_slots = peft_config.num_slots or len(peft_config.fixed_positions)
        else:
            config = config_above(dict(self.model.named_modules()), layers.names[0])
            is_known = peft_config.num_slots is not None
            ids, num_slots = resolve_slots(
                config, peft_config.special_token_ids, peft_config.num_slots
            )
            _check_known(host, ids)
            peft_config.special_token_ids = ids
            peft_config.num_slots = num_slots + (0 if is_known else peft_config.extra_tokens)
        for layer in range(layers.num_layers):
            peft_config.rule(layer)  # complains of slots that there are not
        peft_config.target_modules = layers.names
        self._layers = layers
        self._context = self._context_of(host)
        return peft_config

    @property
    def host(self) -> nn.Module:
        """The backbone: the module around the layers that is given the input."""
        return self.model.get_submodule(self._layers.host_name)

    def _context_of(self, host: nn.Module) -> SlotContext:
        for module in host.modules():
            if isinstance(module, PastaLayer):
                return module.context
        return SlotContext(host)

    @staticmethod
    def _check_target_module_exists(peft_config: PeftConfig, key: str) -> bool:
        assert isinstance(peft_config, PastaConfig)
        return key in (peft_config.target_modules or ())

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
        assert isinstance(peft_config, PastaConfig)
        indexes = self._layers.indexes[self._layers.names.index(current_key)]
        if peft_config.layers is not None and not set(indexes) & set(peft_config.layers):
            return
        if not isinstance(target, PastaLayer):
            target = PastaLayer(target, current_key, indexes, self._context)
            target.train(self.training)
            self._replace_module(parent, target_name, target, target.base_layer)
        target.update_layer(adapter_name, peft_config, self._layers.hidden_size)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        # PEFT's own version moves `weight` and `bias`, which a whole layer does not have.
        setattr(parent, child_name, new_module)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Anything, **kwargs: Anything) -> Iterator[None]:
        with per_row_adapters(self, kwargs):
            yield

    def merge_adapter(self, *args: Anything, **kwargs: Anything) -> NoReturn:
        cannot_merge()

    def merge_and_unload(self, *args: Anything, **kwargs: Anything) -> NoReturn:
        cannot_merge()

    def unload(self) -> nn.Module:
        contexts = [m.context for m in self.model.modules() if isinstance(m, PastaLayer)]
        for hook in contexts[0].hooks if contexts else ():
            hook.remove()
        return super().unload()

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
        tables = tuple(f".{table}" for table in TABLES)
        endings = tuple(f"{table}.{adapter_name}" for table in tables)
        expected = {k: v for k, v in model.state_dict().items() if k.endswith(endings)}
        check_file(expected, remapped, "tables of vectors")
        unknown = sorted(
            k
            for k in remapped
            if any(table in k for table in tables) and k not in model.state_dict()
        )
        if unknown:
            raise BackboneError(
                f"The adapter file holds {unknown[0]!r}, a layer that this model does not have. Load "
                "the adapter on the backbone it was made for."
            )
        return remapped


def _check_known(host: nn.Module, special_token_ids: Sequence[int]) -> None:
    """Nothing, if the backbone has these tokens; the vectors of others would never be added."""
    table = token_table(host)
    unknown = [i for i in special_token_ids if table is not None and i >= table.num_embeddings]
    if table is not None and unknown:
        raise RecipeError(
            f"special_token_ids={list(special_token_ids)} names {unknown[0]}, but {type(host).__name__} "
            f"knows {table.num_embeddings} tokens (0 to {table.num_embeddings - 1}). Name its own "
            "special tokens."
        )


register("PASTA", PastaConfig, PastaModel)

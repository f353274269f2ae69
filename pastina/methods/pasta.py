"""PASTA: a learned vector is added to every special token at the input of every layer.

Yang et al., "Parameter-Efficient Tuning with Special Token Adaptation", arXiv 2210.04382:

    h~_i = h_i + dropout(e_p(i))  where token i is the p-th special token of its row, h_i elsewhere

Shape letters: B rows, T tokens, L layers, S slots, H hidden; V vectors of a layer (S, or fewer when
slots share); N = B * S places.
"""

import copy
import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NoReturn

import torch
import torch.nn.functional as F
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from pastina.errors import BackboneError, PastinaError, RecipeError
from pastina.methods._peft import (
    Anything,
    check_file,
    check_heads,
    check_row_names,
    per_row_adapters,
    register,
)
from pastina.methods.layers import config_above, find_layers
from pastina.methods.placement import Frame, Placement, SlotContext, SlotRule
from pastina.slots import resolve_slots

SHARE = ("none", "by_token", "all")


@dataclass
class PastaConfig(PeftConfig):
    """Settings of one PASTA adapter; what is None is found when the adapter is put on a model."""

    special_token_ids: Sequence[int] | None = None
    """Ids that count as special; None: those of the model's tokenizer or config."""
    num_slots: int | None = None
    """How many special tokens a row may hold; None: as many as a pair has."""
    share: str = "none"
    """"none": a vector per slot; "by_token": per special token; "all": one for all slots."""
    layers: Sequence[int] | None = None
    """The layers that get vectors, counted from 0; None: all."""
    init_std: float = 0.02
    """Standard deviation of the first vectors; 0 starts at the frozen backbone."""
    dropout: float = 0.1
    """On the added vectors."""
    fixed_positions: Sequence[int] | None = None
    """Slots of inputs that have no token ids, such as [0] for the class token of an image model."""
    modules_to_save: list[str] | None = None
    """Modules that learn in full and are stored with the adapter: the head."""
    target_modules: Sequence[str] | None = None
    """Names of the layers in order; None: found."""
    peft_type: str | None = field(default="PASTA")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "PASTA"
        self.special_token_ids = _integers("special_token_ids", self.special_token_ids, least=0)
        self.layers = _integers("layers", self.layers, least=0)
        self.fixed_positions = _integers("fixed_positions", self.fixed_positions, least=None)
        if isinstance(self.target_modules, str):
            raise RecipeError(
                f"target_modules must be a list of layer names; seen the text {self.target_modules!r}."
            )
        if self.target_modules is not None:
            self.target_modules = tuple(self.target_modules)
        if self.share not in SHARE:
            raise RecipeError(f"share must be one of {', '.join(SHARE)}; seen {self.share!r}.")
        if self.num_slots is not None and (type(self.num_slots) is not int or self.num_slots < 1):
            raise RecipeError(f"num_slots must be a whole number from 1; seen {self.num_slots!r}.")
        if not (math.isfinite(self.init_std) and self.init_std >= 0):
            raise RecipeError(f"init_std must be a number from 0; seen {self.init_std!r}.")
        if not 0 <= self.dropout < 1:
            raise RecipeError(f"dropout must be at least 0 and below 1; seen {self.dropout!r}.")
        if self.fixed_positions is not None:
            self._check_fixed_positions(self.fixed_positions)

    def _check_fixed_positions(self, positions: Sequence[int]) -> None:
        if self.share == "by_token":
            raise RecipeError(
                'share="by_token" needs token ids; with fixed_positions use "none" or "all".'
            )
        if self.num_slots is not None and len(positions) > self.num_slots:
            raise RecipeError(
                f"fixed_positions={list(positions)} needs {len(positions)} slots; "
                f"seen num_slots={self.num_slots}."
            )


def _integers(name: str, values: Sequence[int] | None, least: int | None) -> tuple[int, ...] | None:
    if values is None:
        return None
    is_list = isinstance(values, list | tuple | set | range)
    whole = is_list and all(type(v) is int for v in values)
    if not whole or not values or len(set(values)) < len(values):
        raise RecipeError(f"{name} must be a list of different whole numbers; seen {values!r}.")
    if least is not None and min(values) < least:
        raise RecipeError(f"{name} must not hold a number below {least}; seen {list(values)}.")
    return tuple(values)


class PastaLayer(nn.Module, BaseTunerLayer):
    """A layer of the backbone that adds vectors to what it is given; everything else is the layer's.

    `indexes` are the layers of the model that this module stands for: one, or all calls of a layer
    that is shared (ALBERT); then the parameter has the shape [calls, V, H] instead of [V, H].
    """

    adapter_layer_names = ("pasta_vectors",)
    other_param_names = ("pasta_rule", "pasta_dropout", "pasta_rows")

    def __init__(
        self, base_layer: nn.Module, name: str, indexes: tuple[int, ...], context: SlotContext
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.layer_name = name
        self.indexes = indexes
        self.context = context
        self.pasta_vectors = nn.ParameterDict()
        self.pasta_rule: dict[str, SlotRule] = {}
        self.pasta_dropout: dict[str, float] = {}
        self.pasta_rows: dict[str, dict[int, int]] = {}  # call -> row of the parameter
        self._disable_adapters = False
        self.merged_adapters = []

    def __getattr__(self, name: str) -> Anything:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            # Models read attributes of their layers, such as ModernBERT's `attention_type`.
            return getattr(self.base_layer, name)

    def update_layer(self, adapter_name: str, config: PastaConfig, hidden_size: int) -> None:
        rule = rule_of(config)
        num_vectors = {
            "none": rule.num_slots,
            "by_token": len(rule.special_token_ids),
            "all": 1,
        }[config.share]
        calls = [i for i in self.indexes if config.layers is None or i in config.layers]
        shape = (num_vectors, hidden_size)
        if len(self.indexes) > 1:
            shape = (len(calls), *shape)
        first = next(self.base_layer.parameters())
        dtype = torch.promote_types(first.dtype, torch.float32)
        vectors = torch.empty(shape, dtype=dtype, device=first.device)
        self.pasta_vectors[adapter_name] = nn.Parameter(vectors.normal_(std=config.init_std))
        self.pasta_rule[adapter_name] = rule
        self.pasta_dropout[adapter_name] = config.dropout
        self.pasta_rows[adapter_name] = {self.indexes.index(i): row for row, i in enumerate(calls)}
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(
        self, *args: Anything, adapter_names: Sequence[str] | None = None, **kwargs: Anything
    ) -> Anything:
        if self.disable_adapters:
            return self.base_layer(*args, **kwargs)
        if args:
            return self.base_layer(self._add(args[0], adapter_names), *args[1:], **kwargs)
        if "hidden_states" not in kwargs:
            raise BackboneError(
                f"The layer {self.layer_name!r} was called without hidden states; seen the arguments "
                f"{sorted(kwargs)}. PASTA does not know this architecture."
            )
        kwargs["hidden_states"] = self._add(kwargs["hidden_states"], adapter_names)
        return self.base_layer(**kwargs)

    def _add(self, hidden_BTH: Tensor, adapter_names: Sequence[str] | None) -> Tensor:
        frame = self.context.running()
        call = frame.next_call(self.layer_name) if len(self.indexes) > 1 else 0
        if hidden_BTH.dim() != 3:
            raise BackboneError(
                f"The layer {self.layer_name!r} got hidden states of the shape "
                f"{tuple(hidden_BTH.shape)}; PASTA needs [rows, tokens, hidden]."
            )
        if adapter_names is not None:
            return self._add_per_row(hidden_BTH, adapter_names, frame, call)
        num_rows, num_tokens, size = hidden_BTH.shape
        for name in self.active_adapters:
            if call not in self.pasta_rows.get(name, ()):
                continue
            place = frame.place(self.pasta_rule[name], num_rows, num_tokens, hidden_BTH.device)
            delta_BSH = self._delta(name, call, place)
            # Cheaper than adding a dense [B, T, H]: one copy of hidden and N small additions, and
            # the gradient of hidden passes through untouched.
            hidden_BTH = (
                hidden_BTH.reshape(-1, size)
                .index_add(
                    0, place.index_BS.reshape(-1), delta_BSH.to(hidden_BTH.dtype).view(-1, size)
                )
                .view(num_rows, num_tokens, size)
            )
        return hidden_BTH

    def _add_per_row(
        self, hidden_BTH: Tensor, adapter_names: Sequence[str], frame: Frame, call: int
    ) -> Tensor:
        num_rows, num_tokens, size = hidden_BTH.shape
        check_row_names(adapter_names, num_rows)
        flat = hidden_BTH.reshape(-1, size).clone()
        for name, rows in frame.rows_of(adapter_names, hidden_BTH.device).items():
            if call not in self.pasta_rows.get(name, ()):
                continue
            place = frame.place(self.pasta_rule[name], num_rows, num_tokens, hidden_BTH.device)
            vector_BS = None if place.vector_BS is None else place.vector_BS[rows]
            own = Placement(place.index_BS[rows], place.present_BS1[rows], vector_BS)
            delta_BSH = self._delta(name, call, own).to(flat.dtype)
            flat.index_add_(0, own.index_BS.reshape(-1), delta_BSH.view(-1, size))
        return flat.view(num_rows, num_tokens, size)

    def _delta(self, name: str, call: int, place: Placement) -> Tensor:
        vectors_VH = self.pasta_vectors[name]
        if len(self.indexes) > 1:
            vectors_VH = vectors_VH[self.pasta_rows[name][call]]
        if place.vector_BS is None:
            delta_BSH = vectors_VH.expand(*place.index_BS.shape, -1)
        else:
            delta_BSH = F.embedding(place.vector_BS, vectors_VH)
        delta_BSH = F.dropout(delta_BSH, self.pasta_dropout[name], self.training)
        return torch.where(place.present_BS1, delta_BSH, 0.0)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        # PEFT looks for `base_layer.weight`, which a whole layer does not have.
        vectors = self.pasta_vectors[adapter_name]
        target = device or next(self.base_layer.parameters()).device
        if vectors.device.type != "meta":
            self.pasta_vectors[adapter_name] = nn.Parameter(
                vectors.detach().to(target), requires_grad=vectors.requires_grad
            )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        cannot_merge()

    def unmerge(self) -> NoReturn:
        cannot_merge()


def rule_of(config: PastaConfig) -> SlotRule:
    """The rule of a config whose ids and slots are known."""
    return SlotRule(
        tuple(config.special_token_ids or ()),
        config.num_slots or len(config.fixed_positions or ()),
        config.share == "by_token",
        tuple(config.fixed_positions or ()),
    )


def cannot_merge() -> NoReturn:
    raise PastinaError(
        "PASTA cannot be merged into the weights: what it adds depends on the position of a token, "
        "not on a weight. It costs one small addition per layer, so nothing is lost by keeping it; "
        "unload() gives the plain model back."
    )


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
        wrong = [i for i in peft_config.layers or () if i >= layers.num_layers]
        if wrong:
            raise RecipeError(
                f"layers={list(peft_config.layers or ())} names layer {wrong[0]}, but the model has "
                f"{layers.num_layers} layers (0 to {layers.num_layers - 1})."
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
            peft_config.special_token_ids, peft_config.num_slots = resolve_slots(
                config, peft_config.special_token_ids, peft_config.num_slots
            )
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
        ending = f".pasta_vectors.{adapter_name}"
        expected = {k: v for k, v in model.state_dict().items() if k.endswith(ending)}
        check_file(expected, remapped, "tables of vectors")
        unknown = sorted(
            k for k in remapped if ".pasta_vectors" in k and k not in model.state_dict()
        )
        if unknown:
            raise BackboneError(
                f"The adapter file holds {unknown[0]!r}, a layer that this model does not have. Load "
                "the adapter on the backbone it was made for."
            )
        return remapped


register("PASTA", PastaConfig, PastaModel)

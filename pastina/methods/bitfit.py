"""BitFit: the biases learn, the weights do not.

Ben Zaken, Goldberg and Ravfogel, "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based
Masked Language-models", arXiv 2106.10199. What is learned is the difference to the bias that is there,

    y = W x + b + d,    d = 0 at the start,

so the backbone stays as it is, several adapters fit on one model, and a product without a bias can be
given one.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from peft import PeftConfig
from torch import Tensor, nn

from pastina.errors import BackboneError, RecipeError
from pastina.methods._peft import (
    Anything,
    WrappingLayer,
    WrappingTuner,
    check_heads,
    register,
)
from pastina.methods.biases import CHANNEL, has_bias
from pastina.methods.checks import check_flag, check_word, checked_heads
from pastina.methods.layers import model_name
from pastina.methods.targets import PARTS, as_pattern, find_products, product_names

BIASES = ("all", "query_up")


@dataclass
class BitFitConfig(PeftConfig):
    """Settings of one BitFit adapter; what is None is found when the adapter is put on a model."""

    biases: str = "all"
    """"all": every bias of the backbone; "query_up": those of the queries and of the first product of
    the feed-forward nets."""
    add: bool = False
    """Whether products of the layers that have no bias get one."""
    modules_to_save: list[str] | None = None
    """Modules that learn in full and are stored with the adapter: the head."""
    target_modules: str | list[str] | None = None
    """Pattern or names of the modules with biases; None: found."""
    peft_type: str | None = field(default="BITFIT")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "BITFIT"
        self.modules_to_save = checked_heads(self.modules_to_save)
        check_word("biases", self.biases, BIASES)
        check_flag("add", self.add)


class BitFitLayer(WrappingLayer):
    """A module whose output is shifted by what each active adapter has learned, of the shape (out,)."""

    adapter_layer_names = ("bitfit_shift",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.bitfit_shift = nn.ParameterDict()
        self._trailing = CHANNEL[type(base_layer)] - 1

    def update_layer(self, adapter_name: str, config: PeftConfig) -> None:
        weight: Tensor = self.wrapped.weight
        size, dtype = weight.shape[0], torch.promote_types(weight.dtype, torch.float32)
        shift = torch.zeros(size, dtype=dtype, device=weight.device)
        self.bitfit_shift[adapter_name] = nn.Parameter(shift)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Anything, **kwargs: Anything) -> Tensor:
        if self.disable_adapters:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
        for name in self.running(self.bitfit_shift):
            shift = self.bitfit_shift[name].to(result.dtype)
            result = result + shift.view(-1, *(1,) * self._trailing)
        return result

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        base, names = self.wrapped, adapter_names or self.running(self.bitfit_shift)
        if not names:
            return
        self._own_bias = (base.bias,)  # in a tuple it is no parameter of this module
        bias = torch.stack([self.bitfit_shift[name].detach() for name in names]).sum(0)
        if base.bias is not None:
            bias = (base.bias + bias).to(base.bias.dtype)
        base.bias = nn.Parameter(bias, requires_grad=False)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        if self.merged_adapters:
            self.wrapped.bias = self._own_bias[0]
            self.merged_adapters.clear()


class BitFitModel(WrappingTuner):
    """A model whose biases are shifted."""

    prefix = "bitfit_"
    tuner_layer_cls = BitFitLayer

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        assert isinstance(peft_config, BitFitConfig)
        check_heads(self.model, peft_config.modules_to_save)
        if peft_config.target_modules is None:
            names = bias_names(
                self.model,
                peft_config.biases,
                add=peft_config.add,
                without=peft_config.modules_to_save or (),
            )
            peft_config.target_modules = as_pattern(self.model, names)
        return peft_config

    def wrap(self, target: nn.Module, name: str, config: PeftConfig) -> BitFitLayer:
        if type(target) not in CHANNEL:
            raise BackboneError(
                f"{name!r} is a {type(target).__name__}, of which it is not known what its bias does. "
                "Name other modules by target_modules."
            )
        return BitFitLayer(target)


def bias_names(
    model: nn.Module, biases: str, *, add: bool = False, without: Iterable[str] = ()
) -> list[str]:
    """The names of the modules whose biases learn.

    Args:
        biases: one of BIASES.
        add: products of the layers without a bias are meant as well.
        without: endings of the names of modules that learn anyway.

    Raises:
        RecipeError: there is none.
        BackboneError: a module has a bias of which it is not known what it does; the queries are not
            a product of their own.
    """
    if biases == "query_up":
        products = find_products(model)
        if products.is_fused:
            raise BackboneError(
                f"{model_name(model)} has one product for queries, keys and values, so there is no "
                'bias of the queries alone. Choose biases = "all".'
            )
        wanted = product_names(model, ("query", "up"))
        found = [name for name in wanted if add or _bias(model.get_submodule(name)) is not None]
    else:
        heads = {name for name, _ in model.named_modules() if name.endswith(tuple(without))}
        found = [name for name, m in model.named_modules() if _has_bias(name, m, heads)]
        if add:
            found += [name for name in product_names(model, PARTS) if name not in found]
    if not found:
        raise RecipeError(
            f"{model_name(model)} has no biases to train. Give its products some by method.add = "
            "true, or choose another method."
        )
    return found


def _has_bias(name: str, module: nn.Module, heads: set[str]) -> bool:
    above = name.split(".")
    if any(".".join(above[: i + 1]) in heads for i in range(len(above))) or "base_layer" in above:
        return False
    return has_bias(name, module)


def _bias(module: nn.Module) -> Tensor | None:
    bias = module.bias
    return bias if isinstance(bias, Tensor) else None


register("BITFIT", BitFitConfig, BitFitModel)

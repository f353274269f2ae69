"""Bottleneck adapters: small nets in a frozen layer, with one narrow layer inside.

    houlsby    z + s up(f(down z))   after the attention and after the feed-forward net
    pfeiffer   the same              after the feed-forward net
    parallel   z + s up(f(down x))   beside the feed-forward net; x: its input, z: its output

Houlsby et al., arXiv 1902.00751; Pfeiffer et al., arXiv 2005.00247; He et al., arXiv 2110.04366. z is
the output of the last product of its part of the layer, before dropout, residual and norm. `up` is 0 at
the start, so a layer begins as the frozen one.
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from peft import PeftConfig
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pastina.errors import PastinaError, RecipeError
from pastina.methods._peft import Anything, WrappingLayer, WrappingTuner, check_heads, register
from pastina.methods.checks import check_number, check_word, checked_heads
from pastina.methods.layers import find_layers
from pastina.methods.targets import as_pattern, product_names


class Style(NamedTuple):
    """Where the nets stand and their published settings."""

    parts: tuple[str, ...]
    reduction: float
    activation: str
    scaling: float


STYLES = {
    "houlsby": Style(("out", "down"), 16, "silu", 1.0),
    "pfeiffer": Style(("down",), 16, "relu", 1.0),
    "parallel": Style(("down",), 2, "relu", 4.0),
}
ACTIVATIONS = {"relu": F.relu, "silu": F.silu, "gelu": F.gelu}


@dataclass
class BottleneckConfig(PeftConfig):
    """Settings of one bottleneck adapter; what is None is the style's own, or found in the model."""

    style: str = "pfeiffer"
    """"houlsby", "pfeiffer" or "parallel": where the nets stand."""
    reduction: float | None = None
    """How many times narrower than the layer the net is inside."""
    activation: str | None = None
    """"relu", "silu" or "gelu"."""
    scaling: float | None = None
    """How many times the net counts."""
    modules_to_save: list[str] | None = None
    """Modules that learn in full and are stored with the adapter: the head."""
    target_modules: str | list[str] | None = None
    """Pattern or names of the products after which the nets stand; None: found."""
    peft_type: str | None = field(default="BOTTLENECK")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "BOTTLENECK"
        self.modules_to_save = checked_heads(self.modules_to_save)
        check_word("style", self.style, STYLES)
        own = STYLES[self.style]
        self.reduction = own.reduction if self.reduction is None else self.reduction
        self.activation = own.activation if self.activation is None else self.activation
        self.scaling = own.scaling if self.scaling is None else self.scaling
        check_word("activation", self.activation, ACTIVATIONS)
        check_number("reduction", self.reduction, "a number from 1", lambda x: x >= 1)
        check_number("scaling", self.scaling, "a number above 0", lambda x: x > 0)


class Bottleneck(nn.Module):
    """s up(f(down x)), of the shape of x; b + 2 H b + H numbers for a width of b."""

    def __init__(self, size: int, config: BottleneckConfig) -> None:
        super().__init__()
        assert config.reduction is not None
        assert config.activation is not None
        assert config.scaling is not None
        width = int(size / config.reduction)
        if width < 1:
            raise RecipeError(
                f"reduction = {config.reduction:g} leaves nothing of a layer of {size}. Lower it."
            )
        self.down, self.up = nn.Linear(size, width), nn.Linear(width, size)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for start in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(start)
        self.activation, self.scaling = ACTIVATIONS[config.activation], config.scaling

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.activation(self.down(x))) * self.scaling


class BottleneckLayer(WrappingLayer):
    """The last product of a part of a layer, with a net of each adapter after it or beside the part."""

    adapter_layer_names = ("bottleneck_net",)
    other_param_names = ("is_parallel",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.bottleneck_net = nn.ModuleDict()
        self.is_parallel: dict[str, bool] = {}
        self.watcher: RemovableHandle | None = None
        self._input: Tensor | None = None  # of the part of the layer, while it runs

    def see_input(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Keep what goes into the first product of the part (a hook on it)."""
        self._input = args[0]

    def update_layer(self, adapter_name: str, config: PeftConfig) -> None:
        assert isinstance(config, BottleneckConfig)
        weight: Tensor = self.wrapped.weight
        net = Bottleneck(weight.shape[0], config)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.bottleneck_net[adapter_name] = net.to(device=weight.device, dtype=dtype)
        self.is_parallel[adapter_name] = config.style == "parallel"
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Anything, **kwargs: Anything) -> Tensor:
        result = self.base_layer(x, *args, **kwargs)
        part_input, self._input = self._input, None
        names = self.running(self.bottleneck_net)
        if not names:
            return result
        total = result
        for name in names:
            seen = part_input if self.is_parallel[name] else result
            assert seen is not None, "the first product runs before the last one"
            net: Anything = self.bottleneck_net[name]
            total = total + net(seen.to(net.down.weight.dtype)).to(result.dtype)
        return total

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        cannot_merge()

    def unmerge(self) -> NoReturn:
        cannot_merge()


def cannot_merge() -> NoReturn:
    raise PastinaError(
        "Bottleneck adapters cannot be merged into the weights: they bend what passes through them. "
        "unload() gives the plain model back."
    )


class BottleneckModel(WrappingTuner):
    """A model with small nets in its layers."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        assert isinstance(peft_config, BottleneckConfig)
        check_heads(self.model, peft_config.modules_to_save)
        if peft_config.target_modules is None:
            names = product_names(self.model, STYLES[peft_config.style].parts)
            peft_config.target_modules = as_pattern(self.model, names)
        return peft_config

    def wrap(self, target: nn.Module, name: str, config: PeftConfig) -> BottleneckLayer:
        return BottleneckLayer(target)

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Anything, **kwargs: Anything
    ) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self._watch()

    def _watch(self) -> None:
        """Let parallel nets see what goes into their part of the layer."""
        for first, last in feed_forward_ends(self.model):
            layer = self.model.get_submodule(last)
            if (
                isinstance(layer, BottleneckLayer)
                and any(layer.is_parallel.values())
                and layer.watcher is None
            ):
                up = self.model.get_submodule(first)
                layer.watcher = up.register_forward_pre_hook(layer.see_input)
        blind = [
            name
            for name, layer in self.model.named_modules()
            if isinstance(layer, BottleneckLayer)
            and any(layer.is_parallel.values())
            and layer.watcher is None
        ]
        if blind:
            raise RecipeError(
                f"{blind[0]!r} is not the last product of a feed-forward net, so nothing can stand "
                'beside it. Leave out target_modules, or choose style = "pfeiffer".'
            )

    def unload(self) -> nn.Module:
        for layer in self.model.modules():
            if isinstance(layer, BottleneckLayer) and layer.watcher is not None:
                layer.watcher.remove()
        return super().unload()


def feed_forward_ends(model: nn.Module) -> list[tuple[str, str]]:
    """The names of the first and the last product of each layer's feed-forward net."""
    return [
        (names[0], names[-1])
        for layer in find_layers(model).names
        if len(names := product_names(model, ("up", "down"), [layer])) > 1
    ]


register("BOTTLENECK", BottleneckConfig, BottleneckModel)

"""From the method part of a recipe to a config of PEFT."""

from collections.abc import Sequence

from peft import IA3Config, LNTuningConfig, LoraConfig, PeftConfig, TrainableTokensConfig
from torch import nn

from pastina.errors import BackboneError, RecipeError
from pastina.method_options import (
    BitFitOptions,
    BottleneckOptions,
    FullOptions,
    IA3Options,
    LayerNormOptions,
    LinearOptions,
    LoraOptions,
    PastaOptions,
    Section,
    TokensOptions,
)
from pastina.methods._peft import check_heads
from pastina.methods.bitfit import BitFitConfig
from pastina.methods.bottleneck import BottleneckConfig
from pastina.methods.full import FullConfig
from pastina.methods.linear import LinearConfig
from pastina.methods.pasta import PastaConfig
from pastina.methods.targets import as_pattern, find_products, norm_names, product_names


def make_config(
    model: nn.Module,
    options: Section,
    *,
    special_token_ids: Sequence[int] | None = None,
    num_slots: int | None = None,
    heads: list[str] | None = None,
    task_type: str | None = None,
) -> PeftConfig:
    """The config of an adapter for this model; see `pastina.methods.attach`.

    Raises:
        RecipeError: the options do not fit the model.
        BackboneError: the architecture is not known to the method.
    """
    check_heads(model, heads)
    match options:
        case PastaOptions():
            return PastaConfig(
                task_type=task_type,
                special_token_ids=options.special_token_ids or special_token_ids,
                num_slots=options.num_slots or num_slots,
                share=options.share,
                layers=options.layers,
                init_std=options.init_std,
                dropout=options.dropout,
                modules_to_save=heads,
            )
        case LinearOptions():
            return LinearConfig(task_type=task_type, modules_to_save=heads)
        case FullOptions():
            return FullConfig(task_type=task_type)
        case LoraOptions():
            names = None if options.targets else product_names(model, options.parts)
            return LoraConfig(
                task_type=task_type,
                r=options.r,
                lora_alpha=options.alpha,  # type: ignore[arg-type]  # PEFT divides it, no more
                lora_dropout=options.dropout,
                target_modules=options.targets or as_pattern(model, names or []),
                modules_to_save=heads,
            )
        case IA3Options():
            return _ia3(model, options, heads, task_type)
        case LayerNormOptions():
            pattern = as_pattern(model, norm_names(model))
            return LNTuningConfig(
                task_type=task_type, target_modules=pattern, modules_to_save=heads
            )
        case BitFitOptions():
            return BitFitConfig(
                task_type=task_type,
                biases=options.biases,
                add=options.add,
                modules_to_save=heads,
            )
        case BottleneckOptions():
            return BottleneckConfig(
                task_type=task_type,
                style=options.style,
                reduction=options.reduction,
                activation=options.activation,
                scaling=options.scaling,
                modules_to_save=heads,
            )
    raise NotImplementedError(type(options).__name__)


def _ia3(
    model: nn.Module, options: IA3Options, heads: list[str] | None, task_type: str | None
) -> IA3Config:
    """Keys and values are scaled at their output, feed-forward nets at the input of their last product.

    PEFT's own table of targets scales the attention's output product as well in BERT's family, and
    other products in other families.
    """
    targets, feedforward = options.targets, options.feedforward
    if (targets is None) != (feedforward is None):
        raise RecipeError(
            "method.targets and method.feedforward go together: a pattern of all modules, and of those "
            "that are scaled at their input. Name both, or none."
        )
    if targets is None:
        if find_products(model).is_fused:
            raise BackboneError(
                f"{type(model).__name__} has one product for queries, keys and values; (IA)3 scales "
                "keys and values alone. Name patterns of modules (method.targets, "
                "method.feedforward), or choose another method."
            )
        targets = as_pattern(model, product_names(model, ("key", "value", "down")))
        feedforward = as_pattern(model, product_names(model, ("down",)))
    return IA3Config(
        task_type=task_type,
        target_modules=targets,
        feedforward_modules=feedforward,
        modules_to_save=heads,
    )

"""From the method part of a recipe to a config of PEFT."""

import re
from collections.abc import Sequence

from peft import (
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    PromptTuningInit,
    TrainableTokensConfig,
)
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
    PeftOptions,
    PrefixOptions,
    PromptOptions,
    PTuningV2Options,
    Section,
    TokensOptions,
)
from pastina.methods._peft import Anything, check_heads, with_heads
from pastina.methods.bitfit import BitFitConfig
from pastina.methods.bottleneck import BottleneckConfig
from pastina.methods.full import FullConfig
from pastina.methods.layers import find_layers, model_name, token_table
from pastina.methods.linear import LinearConfig
from pastina.methods.others import other_config
from pastina.methods.pasta import PastaConfig
from pastina.methods.pasta_config import PLAIN
from pastina.methods.targets import (
    as_pattern,
    check_pattern,
    find_products,
    norm_names,
    product_names,
)

# PEFT's type of each method; `peft` has any.
TYPES = {
    "pasta": "PASTA",
    "linear": "LINEAR",
    "full": "FULL",
    "lora": "LORA",
    "ia3": "IA3",
    "ln_tuning": "LN_TUNING",
    "bitfit": "BITFIT",
    "bottleneck": "BOTTLENECK",
    "prefix_tuning": "PREFIX_TUNING",
    "p_tuning_v2": "PREFIX_TUNING",
    "prompt_tuning": "PROMPT_TUNING",
    "trainable_tokens": "TRAINABLE_TOKENS",
}


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
                **{name: getattr(options, name) for name in PLAIN},
            )
        case LinearOptions():
            return LinearConfig(task_type=task_type, modules_to_save=heads)
        case FullOptions():
            return FullConfig(task_type=task_type)
        case LoraOptions():
            if options.targets is not None:
                pattern = check_pattern(model, options.targets, "method.targets")
            else:
                pattern = as_pattern(model, product_names(model, options.parts))
            return LoraConfig(
                task_type=task_type,
                r=options.r,
                lora_alpha=options.alpha,  # type: ignore[arg-type]  # PEFT divides it, no more
                lora_dropout=options.dropout,
                target_modules=pattern,
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
        case PrefixOptions() | PTuningV2Options():
            projects = isinstance(options, PrefixOptions)
            return PrefixTuningConfig(
                num_virtual_tokens=options.num_virtual_tokens,
                prefix_projection=projects,
                encoder_hidden_size=options.inner_size if projects else None,  # type: ignore[arg-type]
                modules_to_save=heads,
            )
        case PromptOptions():
            words = PromptTuningInit.SAMPLE_VOCAB
            return PromptTuningConfig(
                num_virtual_tokens=options.num_virtual_tokens,
                prompt_tuning_init=words
                if options.init == "vocabulary"
                else PromptTuningInit.RANDOM,
                token_dim=embeddings_of(model)[1].embedding_dim,
                num_attention_heads=1,  # PEFT asks for it, though prompts have no heads
                modules_to_save=heads,
            )
        case TokensOptions():
            name, table = embeddings_of(model)
            ids = options.special_token_ids or tuple(special_token_ids or ())
            if (
                not ids
                or len(set(ids)) < len(ids)
                or not 0 <= min(ids) <= max(ids) < len(table.weight)
            ):
                raise RecipeError(
                    f"The special tokens whose embeddings learn must be different ids below "
                    f"{len(table.weight)}; seen {list(ids)}. Name them by method.special_token_ids."
                )
            config = TrainableTokensConfig(
                task_type=task_type,
                token_indices=list(ids),
                target_modules=f"{re.escape(name)}",
            )
            return with_heads(config, heads)
        case PeftOptions():
            return other_config(options, heads, task_type)
        case _:
            raise RecipeError(
                f"The options of a method are wanted; seen {type(options).__name__}. Pass for instance "
                "LoraOptions(); `pastina methods` lists all methods."
            )


def num_prompts(options: Section) -> int:
    """How many learned tokens or prefixes this method puts in front of a text."""
    values = options.config if isinstance(options, PeftOptions) else options.model_dump()
    number = values.get("num_virtual_tokens", 0)
    return number if isinstance(number, int) else 0


def embeddings_of(model: nn.Module) -> tuple[str, nn.Embedding]:
    """The name and the module of the table of token embeddings.

    Raises:
        BackboneError: there is none.
    """
    host: Anything = model.get_submodule(find_layers(model).host_name)
    table = token_table(host)
    if table is None:
        raise BackboneError(
            f"{type(host).__name__} has no table of token embeddings. Choose another method."
        )
    return next(name for name, module in model.named_modules() if module is table), table


def _check_within(model: nn.Module, targets: str, feedforward: str) -> None:
    """Nothing, if all products that are scaled at their input are among those that are scaled.

    Raises:
        RecipeError: one is not, and would stay as it is.
    """
    products = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    names = [name for name in products if re.fullmatch(feedforward, name)]
    if outside := [name for name in names if not re.fullmatch(targets, name)]:
        raise RecipeError(
            f"method.feedforward = {feedforward!r} finds {outside[0]!r}, which method.targets does not. "
            "Name in method.targets all modules that are to be scaled."
        )


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
                f"{model_name(model)} has one product for queries, keys and values; (IA)3 scales "
                "keys and values alone. Name patterns of modules (method.targets, "
                "method.feedforward), or choose another method."
            )
        targets = as_pattern(model, product_names(model, ("key", "value", "down")))
        feedforward = as_pattern(model, product_names(model, ("down",)))
    check_pattern(model, targets, "method.targets")
    check_pattern(model, feedforward or "", "method.feedforward")
    _check_within(model, targets, feedforward or "")
    return IA3Config(
        task_type=task_type,
        target_modules=targets,
        feedforward_modules=feedforward,
        modules_to_save=heads,
    )

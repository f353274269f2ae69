"""The method part of a recipe: what each way of tuning can be told, and how it learns by default."""

from typing import Annotated, Any, Literal, NamedTuple, cast, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
)


class Section(BaseModel):
    """A part of a recipe: plain values, no unknown keys, never changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class PastaOptions(Section):
    """Vectors added to the special tokens at the input of every layer (arXiv 2210.04382)."""

    name: Literal["pasta"] = "pasta"
    num_slots: int | None = Field(
        default=None, ge=1
    )  # None: as many as the template of the input has
    share: Literal["none", "by_token", "all"] = "none"
    layers: tuple[int, ...] | None = None  # None: every layer
    init_std: float = Field(default=0.02, ge=0)
    dropout: float = Field(default=0.1, ge=0, lt=1)
    special_token_ids: tuple[int, ...] | None = Field(
        default=None, min_length=1
    )  # None: tokenizer's
    slots: Literal["all", "first", "rest"] | tuple[int, ...] = "all"
    layer_slots: tuple[int, ...] | None = None  # None: as `slots` says
    positions: Literal["special", "first", "random"] = "special"
    everywhere: bool = False
    scale: bool = False
    rank: int = Field(default=0, ge=0, le=256)
    bias_layers: tuple[int, ...] | None = Field(default=None, min_length=1)  # None: no biases
    at: Literal["residual", "keys-values"] = "residual"
    extra_tokens: int = Field(default=0, ge=0, le=64)

    @field_validator("slots", mode="wrap")
    @classmethod
    def _words_or_numbers(cls, value: Any, check: ValidatorFunctionWrapHandler) -> Any:
        try:
            return check(value)
        except ValidationError:
            raise ValueError("should be 'all', 'first', 'rest' or a list of slots") from None

    @field_validator("share", mode="before")
    @classmethod
    def _none_is_a_word(cls, value: Any) -> Any:
        return (
            "none" if value is None else value
        )  # an override's `none` means "not given" elsewhere


class LinearOptions(Section):
    """Linear probe: the backbone as it is, only the head learns."""

    name: Literal["linear"] = "linear"


class FullOptions(Section):
    """Full fine-tuning: everything learns."""

    name: Literal["full"] = "full"


class LoraOptions(Section):
    """A product of two thin matrices beside chosen products of each layer (arXiv 2106.09685)."""

    name: Literal["lora"] = "lora"
    r: int = Field(default=8, ge=1)
    alpha: float = Field(default=16.0, gt=0)  # the product counts alpha / r times
    dropout: float = Field(default=0.0, ge=0, lt=1)
    parts: tuple[Literal["query", "key", "value", "out", "up", "down"], ...] = Field(
        default=("query", "value"), min_length=1
    )
    targets: str | None = None  # a pattern of module names instead of parts


class IA3Options(Section):
    """Scales on keys, values and the inside of the feed-forward net (arXiv 2205.05638)."""

    name: Literal["ia3"] = "ia3"
    targets: str | None = (
        None  # a pattern of module names; None: keys, values and feed-forward nets
    )
    feedforward: str | None = None  # which of the targets are scaled at their input


class LayerNormOptions(Section):
    """Scales and shifts of the norms (arXiv 2312.11420)."""

    name: Literal["ln_tuning"] = "ln_tuning"


class BitFitOptions(Section):
    """The biases (arXiv 2106.10199)."""

    name: Literal["bitfit"] = "bitfit"
    biases: Literal["all", "query_up"] = (
        "all"  # query_up: of queries and first feed-forward products
    )
    add: bool = False  # products of the layers that have no bias get one


class BottleneckOptions(Section):
    """Small nets with one narrow layer (arXiv 1902.00751, 2005.00247, 2110.04366)."""

    name: Literal["bottleneck"] = "bottleneck"
    style: Literal["houlsby", "pfeiffer", "parallel"] = "pfeiffer"
    reduction: float | None = Field(default=None, ge=1)  # None: the style's own
    activation: Literal["relu", "silu", "gelu"] | None = None  # None: the style's own
    scaling: float | None = Field(default=None, gt=0)  # None: the style's own


class PrefixOptions(Section):
    """Keys and values in front of every layer, made by a net while it learns (arXiv 2101.00190)."""

    name: Literal["prefix_tuning"] = "prefix_tuning"
    num_virtual_tokens: int = Field(default=20, ge=1)
    inner_size: int = Field(default=512, ge=1)  # width of the net


class PTuningV2Options(Section):
    """Keys and values in front of every layer, learned as they are (arXiv 2110.07602)."""

    name: Literal["p_tuning_v2"] = "p_tuning_v2"
    num_virtual_tokens: int = Field(default=20, ge=1)


class PromptOptions(Section):
    """Learned tokens in front of the text (arXiv 2104.08691)."""

    name: Literal["prompt_tuning"] = "prompt_tuning"
    num_virtual_tokens: int = Field(default=20, ge=1)
    init: Literal["vocabulary", "random"] = "vocabulary"


class TokensOptions(Section):
    """New embeddings of the special tokens and nothing else."""

    name: Literal["trainable_tokens"] = "trainable_tokens"
    special_token_ids: tuple[int, ...] | None = Field(
        default=None, min_length=1
    )  # None: tokenizer's


class PeftOptions(Section):
    """Any other method of PEFT, by its type, with its config as plain values."""

    name: Literal["peft"] = "peft"
    type: str  # as PEFT writes it, such as "VERA"
    config: dict[str, Any] = Field(default_factory=dict)


MethodOptions = Annotated[
    PastaOptions
    | LinearOptions
    | FullOptions
    | LoraOptions
    | IA3Options
    | LayerNormOptions
    | BitFitOptions
    | BottleneckOptions
    | PrefixOptions
    | PTuningV2Options
    | PromptOptions
    | TokensOptions
    | PeftOptions,
    Field(discriminator="name"),
]

METHOD_OPTIONS: dict[str, type[Section]] = {
    cast(type[Section], option).model_fields["name"].default: option
    for option in get_args(get_args(MethodOptions)[0])
}


class MethodFit(NamedTuple):
    """How a method learns unless told otherwise; lr: of what it trains in the backbone."""

    lr: float
    head_lr: float
    epochs: int


METHOD_FIT: dict[str, MethodFit] = {
    "pasta": MethodFit(3e-2, 1e-2, 10),
    "linear": MethodFit(1e-2, 1e-2, 20),
    "full": MethodFit(1e-4, 1e-3, 3),
    "lora": MethodFit(2e-3, 1e-2, 10),
    "ia3": MethodFit(1e-2, 1e-2, 10),
    "ln_tuning": MethodFit(3e-3, 1e-2, 10),
    "bitfit": MethodFit(3e-3, 1e-2, 10),
    "bottleneck": MethodFit(1e-3, 1e-2, 10),
    "prefix_tuning": MethodFit(1e-3, 1e-2, 10),
    "p_tuning_v2": MethodFit(1e-2, 1e-2, 10),
    "prompt_tuning": MethodFit(3e-2, 1e-2, 10),
    "trainable_tokens": MethodFit(1e-2, 1e-2, 10),
    "peft": MethodFit(1e-3, 1e-2, 10),
}

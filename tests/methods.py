"""The methods beside PASTA with small settings, for the tests that run all of them."""

from typing import Any

from torch import Tensor, nn

from pastina.heads import TaskModel
from pastina.method_options import (
    BitFitOptions,
    BottleneckOptions,
    IA3Options,
    LayerNormOptions,
    LoraOptions,
    PeftOptions,
    PrefixOptions,
    PromptOptions,
    PTuningV2Options,
    Section,
    TokensOptions,
)
from pastina.methods import attach
from tests.models import CONFIGS, PAD, SPECIAL, build

P = 4  # learned tokens
EVERYTHING = ("query", "key", "value", "out", "up", "down")
CASES: dict[str, Section] = {
    "lora": LoraOptions(r=2),
    "lora-everything": LoraOptions(r=2, alpha=1.0, dropout=0.1, parts=EVERYTHING),
    "ia3": IA3Options(),
    "ln_tuning": LayerNormOptions(),
    "bitfit": BitFitOptions(),
    "bitfit-query_up": BitFitOptions(biases="query_up"),
    "bitfit-add": BitFitOptions(add=True),
    "houlsby": BottleneckOptions(style="houlsby", reduction=4),
    "pfeiffer": BottleneckOptions(style="pfeiffer", reduction=4),
    "parallel": BottleneckOptions(style="parallel", reduction=4),
    "prefix_tuning": PrefixOptions(num_virtual_tokens=P, inner_size=8),
    "p_tuning_v2": PTuningV2Options(num_virtual_tokens=P),
    "prompt_tuning": PromptOptions(num_virtual_tokens=P),
    "prompt_tuning-random": PromptOptions(num_virtual_tokens=P, init="random"),
    "trainable_tokens": TokensOptions(),
    "vera": PeftOptions(
        type="VERA",
        config={"target_modules": "(.*[._](query|value|query_proj|q|q_lin|Wqkv))", "r": 4},
    ),
}
IN_FRONT = ("prefix_tuning", "p_tuning_v2", "prompt_tuning", "prompt_tuning-random")
PREFIXED = ("bert", "roberta", "xlm-roberta", "electra")
REFUSED = {
    *((case, name) for case in IN_FRONT[:2] for name in CONFIGS if name not in PREFIXED),
    ("ia3", "modernbert"),
    ("bitfit", "modernbert"),
    ("bitfit", "t5"),
    ("bitfit-query_up", "modernbert"),
    ("bitfit-query_up", "t5"),
}
PAIRS = [(case, name) for case in CASES for name in CONFIGS if (case, name) not in REFUSED]


def plain(name: str, pooling: str = "cls") -> TaskModel:
    """The model without an adapter; without a pooler that nobody reads, as backbones are loaded."""
    backbone: Any = build(name)
    if pooling != "pooler":
        backbone.pooler = None
    return TaskModel(backbone, 3, pooling=pooling).eval()


def model_of(case: str, name: str, pooling: str = "cls") -> Any:
    """A model of tests/models.py with an untrained adapter."""
    return attach(
        plain(name, pooling),
        CASES[case],
        special_token_ids=SPECIAL[name],
        num_slots=3,
        modules_to_save=["classifier"],
        task_type="TOKEN_CLS" if pooling == "tokens" else "SEQ_CLS",
    ).eval()


def learned(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that learn, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def own(model: nn.Module) -> dict[str, nn.Parameter]:
    """Those of the method, without the head."""
    return {name: p for name, p in learned(model).items() if "classifier" not in name}


def padded(inputs: dict[str, Tensor], name: str, more: int) -> dict[str, Tensor]:
    """The same rows with more padding on the right."""
    return {
        "input_ids": nn.functional.pad(inputs["input_ids"], (0, more), value=PAD[name]),
        "attention_mask": nn.functional.pad(inputs["attention_mask"], (0, more)),
    }

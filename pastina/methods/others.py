"""Any other method of PEFT, by its type, with its config as plain values."""

import dataclasses
import difflib

import torch
from torch import nn

from pastina.errors import RecipeError
from pastina.method_options import PeftOptions
from pastina.methods._peft import Anything, known_types, with_heads

# What a type would need that a run does not have.
REFUSED = {
    "ADALORA": "it changes its ranks between the steps of its own training loop",
    "ADAPTION_PROMPT": "it knows decoders only",
    "CPT": "it knows decoders only",
    "MULTITASK_PROMPT_TUNING": "it wants the number of a task with each row",
    "POLY": "it wants the number of a task with each row",
    "SHADOW": "it knows decoders only",
    "XLORA": "it mixes adapters that were trained before",
}
_OURS = {"PASTA", "LINEAR", "FULL", "BITFIT", "BOTTLENECK"}
_SET_BY_US = {
    "peft_type",
    "task_type",
    "modules_to_save",
    "inference_mode",
    "base_model_name_or_path",
    "auto_mapping",
}


def other_config(options: PeftOptions, heads: list[str] | None, task_type: str | None) -> Anything:
    """The config of this type with these values.

    Raises:
        RecipeError: no such type, one that a run cannot train, unknown keys or values.
    """
    types = known_types()
    if options.type not in types:
        near = difflib.get_close_matches(options.type.upper(), types, n=1, cutoff=0.5)
        hint = f"Did you mean {near[0]!r}?" if near else f"It has {', '.join(sorted(types))}."
        raise RecipeError(f"method.type: PEFT has no {options.type!r}. {hint}")
    if reason := REFUSED.get(options.type):
        raise RecipeError(f"method.type = {options.type!r} cannot be trained here: {reason}.")
    if options.type in _OURS:
        raise RecipeError(
            f"method.type = {options.type!r} is not PEFT's but pastina's own. Write method.name = "
            f"{options.type.lower()!r}."
        )
    config_cls = types[options.type]
    fields = {field.name for field in dataclasses.fields(config_cls) if field.init}
    for key in options.config:
        if key in _SET_BY_US:
            raise RecipeError(f"method.config.{key} is set by pastina itself. Remove it.")
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1, cutoff=0.5)
            known = ", ".join(sorted(fields - _SET_BY_US))
            hint = f"Did you mean {near[0]!r}?" if near else f"It has {known}."
            raise RecipeError(f"method.config: {config_cls.__name__} has no {key!r}. {hint}")
    config = build(config_cls, options.config, task_type)
    if getattr(config, "num_virtual_tokens", 1) is None:
        raise RecipeError(
            f"method.config.num_virtual_tokens: {options.type!r} needs it. Say how many, such as 10."
        )
    return with_heads(config, heads)


def build(config_cls: Anything, values: dict[str, Anything], task_type: str | None) -> Anything:
    """The config of these values; PEFT's complaints become ours."""
    try:
        config = config_cls(**values)
        if not config.is_prompt_learning:
            config.task_type = task_type
    except (TypeError, ValueError) as error:
        raise RecipeError(f"method.config: {config_cls.__name__} says: {error}") from error
    return config


def fingerprint(model: nn.Module) -> dict[int, tuple[float, float]]:
    """Two sums over each tensor of a model, by which a change shows."""
    return {
        id(p): (p.detach().double().sum().item(), p.detach().double().square().sum().item())
        for p in model.parameters()
        if p.device != torch.device("meta")
    }


def check_untouched(model: nn.Module, before: dict[int, tuple[float, float]], what: str) -> None:
    """Nothing, if the tensors that were there have the sums that they had.

    Raises:
        RecipeError: a method changed the backbone itself, which the adapter's file would not hold.
    """
    now = fingerprint(model)
    if any(now.get(key, sums) != sums for key, sums in before.items()):
        raise RecipeError(
            f"{what} changes the backbone's own weights before it learns, and an adapter holds only "
            "what is added to them. Choose another start (such as init_lora_weights = true), or "
            "another type."
        )

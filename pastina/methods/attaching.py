"""A model with an adapter: a new one, or one from disk."""

from collections.abc import Sequence

from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn

from pastina.method_options import Section
from pastina.methods._peft import quiet
from pastina.methods.configs import make_config


def attach(
    task_model: nn.Module,
    options: Section,
    *,
    special_token_ids: Sequence[int] | None = None,
    num_slots: int | None = None,
    modules_to_save: Sequence[str] | None = None,
    task_type: str | None = None,
) -> PeftModel:
    """`task_model` with an untrained adapter named "default".

    Args:
        task_model: a transformers model, or a module that holds one.
        options: the method part of a recipe; what it says goes before the next two.
        special_token_ids: the tokenizer's special tokens.
        num_slots: how many special tokens an input has.
        modules_to_save: names of the modules that learn in full: the head.
        task_type: PEFT's task type; None: PEFT passes all arguments through.

    Raises:
        RecipeError: the options do not fit the model.
        BackboneError: the architecture is not known to the method.
    """
    config = make_config(
        task_model,
        options,
        special_token_ids=special_token_ids,
        num_slots=num_slots,
        heads=list(modules_to_save) if modules_to_save is not None else None,
        task_type=task_type,
    )
    return _wrapped(task_model, config)


def _wrapped(model: nn.Module, config: PeftConfig) -> PeftModel:
    with quiet():
        wrapped = get_peft_model(model, config, adapter_name="default")
    assert isinstance(wrapped, PeftModel)
    return wrapped

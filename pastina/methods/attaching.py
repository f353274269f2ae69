"""A model with an adapter: a new one, or one from disk."""

from collections.abc import Sequence
from pathlib import Path

from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn

from pastina.errors import AdapterError, PastinaError, RecipeError
from pastina.method_options import PeftOptions, Section
from pastina.methods._peft import check_file, quiet, type_of, with_heads
from pastina.methods.configs import TYPES, make_config
from pastina.methods.layers import model_name
from pastina.methods.others import REFUSED, check_untouched, fingerprint
from pastina.methods.prompts import PromptedModel


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
    if isinstance(options, PeftOptions):
        return _checked(task_model, config, "method.config")
    if getattr(options, "targets", None):
        return _checked(task_model, config, "method.targets")
    return _wrapped(task_model, config)


def load(
    task_model: nn.Module,
    folder: Path | str,
    method: str,
    tensors: dict[str, Tensor],
    heads: Sequence[str] = ("classifier",),
) -> PeftModel:
    """`task_model` with the adapter in this folder, which cannot learn on.

    Args:
        task_model: the same kind of model that the adapter was trained on, with an untrained head.
        folder: PEFT's files of the adapter.
        method: the name of the method in the adapter's card.
        tensors: what the folder's safetensors file holds.
        heads: as modules_to_save of `attach`.

    Raises:
        AdapterError: the files are of another method; a tensor is missing.
        ValueError, RuntimeError, TypeError, KeyError: PEFT's, of files that do not fit the model.
    """
    config = PeftConfig.from_pretrained(str(folder))
    kind = type_of(config)
    wanted = TYPES.get(method)
    if (wanted is None and kind in REFUSED) or (wanted is not None and kind != wanted):
        raise AdapterError(
            f"The adapter's card says it was trained with {method!r}, its config is of PEFT's type "
            f"{kind[:50]!r}. Copy it again from where it came."
        )
    if kind != "FULL":
        with_heads(config, list(heads))
    wrapper = PeftModel
    if config.is_prompt_learning:
        config.task_type, wrapper = None, PromptedModel
    with quiet():
        model = wrapper.from_pretrained(task_model, str(folder), config=config)
    # PEFT itself leaves a tensor that is missing at its random start.
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    check_file(expected, tensors, "tensors")
    return model


def _wrapped(model: nn.Module, config: PeftConfig) -> PeftModel:
    if config.is_prompt_learning:
        return PromptedModel(model, config, "default")
    with quiet():
        wrapped = get_peft_model(model, config, adapter_name="default")
    assert isinstance(wrapped, PeftModel)
    return wrapped


def _checked(model: nn.Module, config: PeftConfig, chosen: str) -> PeftModel:
    """The same where a user wrote what PEFT gets, in `chosen`: what it says becomes our error."""
    before, kind = fingerprint(model), type_of(config)
    try:
        wrapped = _wrapped(model, config)
    except PastinaError:
        raise
    except Exception as error:
        raise RecipeError(
            f"PEFT's {kind} cannot be put on {model_name(model)}: {str(error).rstrip('.')}. Correct "
            f"{chosen}, or choose another method."
        ) from error
    check_untouched(model, before, f"PEFT's {kind}")
    return wrapped

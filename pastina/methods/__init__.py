"""The ways of tuning. Importing this registers them with PEFT."""

from collections.abc import Sequence
from dataclasses import dataclass

from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from pastina.errors import BackboneError
from pastina.methods.full import FullConfig as FullConfig
from pastina.methods.full import FullModel
from pastina.methods.layers import find_layers
from pastina.methods.linear import LinearConfig as LinearConfig
from pastina.methods.pasta import PastaConfig as PastaConfig
from pastina.methods.pasta import PastaLayer, PastaModel
from pastina.methods.pasta_config import PLAIN
from pastina.recipe import FullOptions, LinearOptions, PastaOptions


@dataclass(frozen=True, slots=True)
class Method:
    """What a user has to know about a way of tuning."""

    name: str
    title: str
    paper: str
    fits: str
    options: type[PastaOptions] | type[LinearOptions] | type[FullOptions]


METHODS: dict[str, Method] = {
    "pasta": Method(
        "pasta",
        "Special token adaptation",
        "https://arxiv.org/abs/2210.04382",
        "encoders that put special tokens around a text; class tokens of image and audio models by "
        "fixed positions; every kind of task",
        PastaOptions,
    ),
    "linear": Method(
        "linear",
        "Linear probe",
        "https://arxiv.org/abs/1610.01644",
        "every model and kind of task; the floor to compare with",
        LinearOptions,
    ),
    "full": Method(
        "full",
        "Full fine-tuning",
        "https://arxiv.org/abs/1810.04805",
        "every model and kind of task; the adapter is as large as the model and serves one task",
        FullOptions,
    ),
}


def attach(
    task_model: nn.Module,
    options: PastaOptions | LinearOptions | FullOptions,
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
    """
    heads = list(modules_to_save) if modules_to_save is not None else None
    match options:
        case PastaOptions():
            config = PastaConfig(
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
            config = LinearConfig(task_type=task_type, modules_to_save=heads)
        case FullOptions():
            config = FullConfig(task_type=task_type)
    model = get_peft_model(task_model, config, adapter_name="default")
    assert isinstance(model, PeftModel)
    return model


def train_mode(model: nn.Module) -> None:
    """Put a model with an adapter into the mode it learns in.

    The frozen backbone stays in eval mode, so that its own dropout does not blur what the adapter
    sees; the vectors, the heads and what stands around the backbone are in train mode. With full
    fine-tuning everything is.
    """
    model.train()
    tuners = [m for m in model.modules() if isinstance(m, BaseTuner)]
    if not tuners:
        raise BackboneError(
            f"{type(model).__name__} has no adapter, so it is not known what learns. Use attach()."
        )
    if isinstance(tuners[0], FullModel):
        return
    host = _frozen_part(tuners[0])
    heads = [m for m in host.modules() if isinstance(m, AuxiliaryTrainingWrapper)]
    learning = {id(part) for head in heads for part in head.modules()}
    for module in host.modules():
        # A layer with gradient checkpointing uses it only in train mode. The flag of the layer itself
        # switches nothing else: dropout is in its parts.
        checkpoints = (
            isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing
        )
        module.training = isinstance(module, PastaLayer) or checkpoints or id(module) in learning


def _frozen_part(tuner: BaseTuner) -> nn.Module:
    if isinstance(tuner, PastaModel):
        return tuner.host
    try:
        return tuner.model.get_submodule(find_layers(tuner.model).host_name)
    except BackboneError:
        # An architecture that only PASTA would have to understand: all but the heads is frozen.
        return tuner.model

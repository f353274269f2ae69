"""Which parts of a model are in train mode while an adapter learns."""

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from pastina.errors import BackboneError
from pastina.methods.full import FullModel
from pastina.methods.layers import find_layers
from pastina.methods.pasta import PastaModel
from pastina.methods.prompts import PromptedModel


def train_mode(model: nn.Module) -> None:
    """Put a model with an adapter into the mode it learns in.

    One rule for all methods: what the backbone brought along stays in eval mode, so that its own
    dropout does not blur what the adapter sees; what the method added, the heads and what stands
    around the backbone are in train mode. With full fine-tuning everything is.
    """
    model.train()
    tuners = [m for m in model.modules() if isinstance(m, BaseTuner | PromptedModel)]
    if not tuners:
        raise BackboneError(
            f"{type(model).__name__} has no adapter, so it is not known what learns. Use attach()."
        )
    if isinstance(tuners[0], FullModel):
        return
    host = _frozen_part(tuners[0])
    added = _added(host)
    for module in host.modules():
        # A layer with gradient checkpointing uses it only in train mode. The flag of the layer itself
        # switches nothing else: dropout is in its parts.
        checkpoints = (
            isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing
        )
        module.training = checkpoints or id(module) in added


def _added(host: nn.Module) -> set[int]:
    """The modules in the backbone that are not its own: heads, and layers without what they wrap."""
    found: set[int] = set()
    for module in host.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            found.update(id(part) for part in module.modules())
        elif isinstance(module, BaseTunerLayer):
            wrapped = getattr(module, "base_layer", None)
            inner = set() if wrapped is None else {id(part) for part in wrapped.modules()}
            found.update(id(part) for part in module.modules() if id(part) not in inner)
    return found


def _frozen_part(tuner: BaseTuner | PromptedModel) -> nn.Module:
    if isinstance(tuner, PastaModel | PromptedModel):
        return tuner.host
    try:
        return tuner.model.get_submodule(find_layers(tuner.model).host_name)
    except BackboneError:
        # An architecture that only PASTA would have to understand: all but the heads is frozen.
        return tuner.model

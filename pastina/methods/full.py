"""Full fine-tuning as a PEFT method: everything learns, and the file holds the whole model."""

from dataclasses import dataclass, field
from typing import NoReturn

from peft import PeftConfig
from torch import Tensor, nn

from pastina.errors import PastinaError
from pastina.methods._peft import NO_TARGETS, HeadOnlyTuner, check_file, register


@dataclass
class FullConfig(PeftConfig):
    """Settings of full fine-tuning; there are none, as the head learns with the rest."""

    target_modules: str = NO_TARGETS
    peft_type: str | None = field(default="FULL")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "FULL"
        if self.task_type == "TOKEN_CLS":
            self.task_type = None  # PEFT's class for it insists on a head in modules_to_save


class FullModel(HeadOnlyTuner):
    """A model that learns as a whole."""

    prefix = "full_"

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        if len(self.peft_config) > 1:
            raise PastinaError(
                "Full fine-tuning changes the model itself, so a model holds one such adapter; seen "
                f"{', '.join(self.peft_config)}. Load the other one on its own copy of the model."
            )
        return peft_config

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        frozen = any(config.inference_mode for config in self.peft_config.values())
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad = not frozen

    def disable_adapter_layers(self) -> NoReturn:
        raise PastinaError(
            "Full fine-tuning cannot be switched off: the old weights are gone. Load the backbone again."
        )

    def merge_and_unload(self, *args: object, **kwargs: object) -> nn.Module:
        return self.unload()

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        return dict(state_dict)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        check_file(model.state_dict(), state_dict, "tensors")
        return state_dict


register("FULL", FullConfig, FullModel)

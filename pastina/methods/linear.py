"""Linear probe: the backbone as it is, only the head learns."""

from dataclasses import dataclass, field

from peft import PeftConfig
from torch import nn

from pastina.errors import RecipeError
from pastina.methods._peft import NO_TARGETS, HeadOnlyTuner, check_heads, register
from pastina.methods.checks import checked_heads


@dataclass
class LinearConfig(PeftConfig):
    """Settings of a head that learns alone."""

    modules_to_save: list[str] | None = None
    """The modules that learn and are stored."""
    target_modules: str = NO_TARGETS
    peft_type: str | None = field(default="LINEAR")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "LINEAR"
        self.modules_to_save = checked_heads(self.modules_to_save)


class LinearModel(HeadOnlyTuner):
    """A frozen model with a head that learns."""

    prefix = "linear_"

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        assert isinstance(peft_config, LinearConfig)
        if not peft_config.modules_to_save:
            raise RecipeError(
                "LinearConfig trains only the modules in modules_to_save, and none is named. Pass the "
                'name of the head, such as modules_to_save=["classifier"].'
            )
        check_heads(self.model, peft_config.modules_to_save)
        return peft_config

    def merge_and_unload(self, *args: object, **kwargs: object) -> nn.Module:
        # Nothing in the backbone changed: the trained head takes its place, which is all.
        return self.unload()


register("LINEAR", LinearConfig, LinearModel)

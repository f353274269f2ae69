"""Methods in front of the text: learned tokens, or learned keys and values for every layer.

PEFT's own classes for them read the first output as if it were [CLS], and run a head of their own. Here
the backbone does the whole work: around it the input is extended, and of its output only the states of
the text are left. So heads, poolings and taggers read the same tokens as with every other method.

P learned tokens take the positions 0 to P - 1, and the text those behind; PEFT has it so too.

Shape letters: B rows, T tokens of the text, P learned tokens, H hidden.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from peft import PeftConfig, PeftModel
from torch import Tensor, nn

from pastina.errors import AdapterError, BackboneError, DataError
from pastina.methods._peft import Anything, is_prefix, switch_heads
from pastina.methods.layers import find_layers

# Encoders that take keys and values from outside; T5 takes them and fails at its position bias.
PREFIXED = ("bert", "roberta", "xlm-roberta", "camembert", "electra")


class PromptedModel(PeftModel):
    """PEFT's model of a method in front of the text, with another way to run it.

    Raises:
        BackboneError: the backbone takes no prefixes, or no embeddings in place of tokens.
    """

    def __init__(
        self, model: nn.Module, peft_config: PeftConfig, *args: Anything, **kwargs: Anything
    ) -> None:
        self._host_name = find_layers(model).host_name
        check_host(model.get_submodule(self._host_name), peft_config)
        super().__init__(model, peft_config, *args, **kwargs)

    @property
    def host(self) -> Anything:
        """The backbone: the module around the layers that is given the input."""
        return self.base_model.get_submodule(self._host_name)

    @property
    def device(self) -> torch.device:
        """Where the backbone is; PEFT asks for it."""
        return next(self.base_model.parameters()).device

    def forward(self, *args: Anything, **kwargs: Anything) -> Anything:
        """What the model says of the text behind the learned tokens."""
        if kwargs.pop("adapter_names", None) is not None:
            raise AdapterError(
                "Methods in front of the text have one adapter for a whole batch; adapter_names names "
                "one for each row. Use set_adapter, and a batch for each adapter."
            )
        if self._adapters_disabled:
            return self.base_model(*args, **kwargs)
        with self._around_host():
            return self.base_model(*args, **kwargs)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """While it is open, the model is the frozen one; PEFT's own version needs a decoder."""
        was_disabled, self._adapters_disabled = self._adapters_disabled, True
        switch_heads(self.base_model, False)
        try:
            yield
        finally:
            self._adapters_disabled = was_disabled
            switch_heads(self.base_model, not was_disabled)

    @contextmanager
    def _around_host(self) -> Iterator[None]:
        handles = [
            self.host.register_forward_pre_hook(self._extend, with_kwargs=True),
            self.host.register_forward_hook(self._cut),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @property
    def num_prompts(self) -> int:
        """P of the active adapter."""
        config: Anything = self.active_peft_config
        return config.num_virtual_tokens

    def _extend(
        self, host: nn.Module, args: tuple, kwargs: dict[str, Anything]
    ) -> tuple[tuple, dict[str, Anything]]:
        """The input with what was learned in front of it."""
        inputs = inspect.signature(host.forward).bind(*args, **kwargs).arguments
        inputs |= inputs.pop("kwargs", {})
        ids_BT = inputs.get("input_ids")
        if not isinstance(ids_BT, Tensor):
            raise DataError("Methods in front of the text need input_ids, and the input has none.")
        mask_BT = inputs.get("attention_mask")
        mask_BT = torch.ones_like(ids_BT) if mask_BT is None else mask_BT
        inputs["attention_mask"] = F.pad(mask_BT, (self.num_prompts, 0), value=1)
        if is_prefix(self.active_peft_config):
            self._check_checkpointing()
            inputs["past_key_values"] = self.get_prompt(len(ids_BT))
            return (), inputs
        words_BTH = host.get_input_embeddings()(inputs.pop("input_ids"))  # type: ignore[operator]
        prompts_BPH = self.get_prompt(len(ids_BT)).to(words_BTH.dtype)
        inputs["inputs_embeds"] = torch.cat([prompts_BPH, words_BTH], 1)
        if (types_BT := inputs.get("token_type_ids")) is not None:
            inputs["token_type_ids"] = F.pad(types_BT, (self.num_prompts, 0))
        return (), inputs

    def _cut(self, host: nn.Module, args: tuple, output: Anything) -> Anything:
        """The output without the states of the learned tokens; a pooler reads the text's first one."""
        if is_prefix(self.active_peft_config):
            return output
        output["last_hidden_state"] = output.last_hidden_state[:, self.num_prompts :]
        if output.get("hidden_states") is not None:
            states = (state[:, self.num_prompts :] for state in output.hidden_states)
            output["hidden_states"] = tuple(states)
        if output.get("pooler_output") is not None:
            output["pooler_output"] = _pool(host, output.last_hidden_state)
        return output

    def _check_checkpointing(self) -> None:
        """Layers with gradient checkpointing silently leave prefixes out."""
        if any(m.training and getattr(m, "gradient_checkpointing", False) for m in self.modules()):
            raise BackboneError(
                "Prefixes do not go with gradient checkpointing: a layer that is run again has none. "
                "Switch it off, or choose another method."
            )


def _pool(host: Anything, hidden_BTH: Tensor) -> Tensor:
    if isinstance(host.pooler, nn.Linear):  # ALBERT
        return host.pooler_activation(host.pooler(hidden_BTH[:, 0]))
    return host.pooler(hidden_BTH)


def check_host(host: nn.Module, config: PeftConfig) -> None:
    """Nothing, if a backbone can be run with what this method puts in front of the text.

    Raises:
        BackboneError: it cannot.
    """
    takes = inspect.signature(host.forward).parameters
    if is_prefix(config):
        kind = getattr(host.config, "model_type", type(host).__name__)
        if kind not in PREFIXED or getattr(host.config, "is_decoder", False):
            raise BackboneError(
                f"Prefixes are keys and values from outside, which {type(host).__name__} of "
                "transformers does not take, or not rightly. Choose another method, or a backbone of "
                f"the type {', '.join(PREFIXED[:-1])} or {PREFIXED[-1]}."
            )
    elif "inputs_embeds" not in takes:
        raise BackboneError(
            f"{type(host).__name__} takes no embeddings in place of tokens, so nothing can be put in "
            "front of the text. Choose another method."
        )

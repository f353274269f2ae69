"""One text through a backbone, with everything that is looked at kept on the way.

Shape letters: L layers, H heads, T tokens, D hidden, E size of a head's output.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from pastina.errors import BackboneError
from pastina.methods.layers import find_layers
from pastina.methods.pasta_layer import keys_and_values

# Where the outputs of all heads, side by side, go into one linear layer.
_PROJECTIONS = (
    "attention.output.dense",  # BERT, RoBERTa, XLM-R, CamemBERT, ELECTRA, DeBERTa
    "attention.out_lin",  # DistilBERT
    "attn.Wo",  # ModernBERT
    "attention.attn.o",  # MPNet
    "attention.dense",  # ALBERT
    "layer.0.SelfAttention.o",  # T5
)


@dataclass(frozen=True, slots=True)
class Trace:
    """attention_LHTT: weights, rows sum to 1; output_LTHE: of each head; state_LTD: what each layer, or
    its keys and values, is given, before a vector is added."""

    attention_LHTT: Tensor
    output_LTHE: Tensor
    state_LTD: Tensor


class Tracer:
    """Runs a model on one text at a time and keeps what its attention does.

    model: the backbone, or what is wrapped around it. backbone: the transformers model inside; it is
    switched to the attention that works with weights one can see. inside: the states to keep are what
    keys and values read, not what the layers are given.
    """

    def __init__(self, model: nn.Module, backbone: Any, *, inside: bool = False) -> None:
        backbone.set_attn_implementation("eager")
        self.model, self.backbone = model, backbone
        found = find_layers(model)
        self.num_layers = found.num_layers
        layers = {name: model.get_submodule(name) for name in found.names}
        self._projections = [_projection(layer) for layer in layers.values()]
        self._readers = list(layers.values())
        if inside:
            self._readers = [keys_and_values(layer, name)[0] for name, layer in layers.items()]

    def run(self, inputs: Mapping[str, Tensor]) -> Trace:
        """What happens inside for this one text, inputs (1, T).

        Raises:
            BackboneError: the model shows no attention weights, or the method adds tokens of its own.
        """
        states: list[Tensor] = []
        outputs: list[Tensor] = []
        answers: list[Any] = []

        def keep_state(module: nn.Module, args: Any, kwargs: Any) -> None:
            states.append((args[0] if args else kwargs["hidden_states"])[0])

        def keep_output(module: nn.Module, args: Any) -> None:
            outputs.append(args[0][0])

        def keep_answer(module: nn.Module, args: Any, answer: Any) -> None:
            answers.append(answer)

        with ExitStack() as stack, torch.inference_mode():
            for reader in self._readers:
                hook = reader.register_forward_pre_hook(keep_state, with_kwargs=True)
                stack.callback(hook.remove)
            for projection in self._projections:
                stack.callback(projection.register_forward_pre_hook(keep_output).remove)
            stack.callback(self.backbone.register_forward_hook(keep_answer).remove)
            self.model(**inputs, output_attentions=True)
        weights = getattr(answers[-1], "attentions", None) or ()
        num_tokens = inputs["input_ids"].shape[1]
        self._check(weights, states, outputs, num_tokens)
        attention_LHTT = torch.stack([layer_BHTT[0] for layer_BHTT in weights]).float().cpu()
        num_heads = attention_LHTT.shape[1]
        output_LTHE = torch.stack(outputs).float().cpu().unflatten(-1, (num_heads, -1))
        return Trace(attention_LHTT, output_LTHE, torch.stack(states).float().cpu())

    def _check(self, weights: Any, states: Any, outputs: Any, num_tokens: int) -> None:
        name = type(self.backbone).__name__
        shapes = {tuple(w.shape[-2:]) for w in weights} | {
            (s.shape[0],) * 2 for s in (*states, *outputs)
        }
        counts = {len(weights), len(states), len(outputs)}
        if counts != {self.num_layers}:
            raise BackboneError(
                f"{name} shows the attention of {len(weights)} and the outputs of {len(outputs)} of "
                f"its {self.num_layers} layers. pastina look does not know this architecture."
            )
        if shapes != {(num_tokens, num_tokens)}:
            raise BackboneError(
                f"The text has {num_tokens} tokens, but the attention of {name} has the shape "
                f"{' and '.join(map(str, sorted(shapes)))}. A method that adds tokens of its own cannot "
                "be compared place by place; look at an adapter of another method."
            )


def _projection(layer: nn.Module) -> nn.Module:
    """The linear layer that is given the outputs of all heads, also where a method has wrapped it."""
    plain = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    modules = {name.replace("base_layer.", ""): m for name, m in reversed([*plain.named_modules()])}
    for ending in _PROJECTIONS:
        for name, module in modules.items():
            if f".{name}".endswith(f".{ending}"):  # ALBERT: a group of layers stands around it
                return module
    raise BackboneError(
        f"The outputs of the heads of {type(plain).__name__} were not found (none of "
        f"{', '.join(_PROJECTIONS)}). pastina look does not know this architecture."
    )

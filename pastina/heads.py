"""The model of one task: a backbone, a pooling and one linear layer.

Shape letters: B rows, T tokens, H hidden, C outputs.
"""

from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput, TokenClassifierOutput

from pastina.errors import BackboneError

POOLINGS = ("pooler", "cls", "mean")


class TaskModel(nn.Module):
    """A backbone with a head, laid out as transformers lays out its own classifiers.

    The backbone is the attribute that its `base_model_prefix` names (`bert`, `roberta`, ...), the
    head is `classifier`; so an adapter trained here has the keys that PEFT writes for
    `AutoModelForSequenceClassification` and `AutoModelForTokenClassification`.

    pooling: "pooler" (the checkpoint's frozen pooler on [CLS], as in the paper), "cls", "mean", or
    "tokens" (each token for itself).
    """

    def __init__(
        self, backbone: Any, num_outputs: int, *, pooling: str, dropout: float = 0.1, seed: int = 0
    ) -> None:
        super().__init__()
        if pooling not in (*POOLINGS, "tokens"):
            raise BackboneError(f"Unknown pooling {pooling!r}; known: {', '.join(POOLINGS)}.")
        if pooling == "pooler" and getattr(backbone, "pooler", None) is None:
            raise BackboneError(
                f"The checkpoint {backbone.name_or_path} has no trained pooler. "
                "Choose head.pooling = 'cls' or 'mean'."
            )
        self.config = backbone.config
        self.pooling = pooling
        self._backbone_name = backbone.base_model_prefix
        setattr(self, self._backbone_name, backbone)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(backbone.config.hidden_size, num_outputs)
        # its own generator: the head does not shift the order of the data
        generator = torch.Generator().manual_seed(seed)
        nn.init.normal_(self.classifier.weight, std=0.02, generator=generator)
        nn.init.zeros_(self.classifier.bias)

    @property
    def backbone(self) -> Any:
        """The transformers model inside."""
        return getattr(self, self._backbone_name)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        **options: Any,
    ) -> SequenceClassifierOutput | TokenClassifierOutput:
        """Logits (B, C), or (B, T, C) for pooling "tokens"."""
        options = {name: value for name, value in options.items() if value is not None}
        if "labels" in options:
            raise TypeError("TaskModel returns logits only; the loss belongs to the kind.")
        options.pop("return_dict", None)
        if token_type_ids is not None:
            options["token_type_ids"] = token_type_ids
        output = self.backbone(input_ids=input_ids, attention_mask=attention_mask, **options)
        if self.pooling == "tokens":
            return TokenClassifierOutput(logits=self.head(output.last_hidden_state))
        pooled_BH = self.pool(output, attention_mask)
        return SequenceClassifierOutput(logits=self.head(pooled_BH))

    def pool(self, output: Any, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """One vector per row, (B, H)."""
        hidden_BTH = output.last_hidden_state
        if self.pooling == "pooler":
            return output.pooler_output
        if self.pooling == "cls":
            return (
                hidden_BTH[:, 0] if attention_mask is None else _first(hidden_BTH, attention_mask)
            )
        if attention_mask is None:
            return hidden_BTH.mean(1)
        mask_BT1 = attention_mask[..., None].to(hidden_BTH.dtype)
        return (hidden_BTH * mask_BT1).sum(1) / mask_BT1.sum(1)

    def head(self, states: torch.Tensor) -> torch.Tensor:
        """Dropout and the linear layer; the head learns and answers in its own precision."""
        with torch.autocast(states.device.type, enabled=False):
            return self.classifier(self.dropout(states).to(_dtype(self.classifier)))


def _dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


def _first(hidden_BTH: torch.Tensor, attention_mask_BT: torch.Tensor) -> torch.Tensor:
    """The state of the first real token of each row, whichever side is padded."""
    first_B = attention_mask_BT.to(torch.int).argmax(1)
    return hidden_BTH[torch.arange(len(first_B), device=first_B.device), first_B]

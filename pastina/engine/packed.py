"""The fast engine of encoders it knows: no padding, nothing that nobody reads, no dead gradient.

The rows of a batch are laid one after the other (packed). The last layer works only where the head
reads, the first layer with vectors passes a gradient only to the tokens that got one, and layers
below it remember nothing. The frozen weights never get a gradient.

Random draws are those of the reference engine (vectors first, layer by layer, then the head), so both
train alike; only a tagger's head draws its dropout for the words it is asked for instead of all tokens.

Shape letters: P packed tokens, B rows, T tokens, N items or states that are read, R tokens that a
vector is added to, H hidden, C outputs.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from pastina.engine.addition import Addition, Product, Shift, joined
from pastina.engine.affine import Precision
from pastina.engine.batching import Batch
from pastina.engine.encoder import Encoder, spots
from pastina.engine.families import why_not_frozen, why_not_shifted
from pastina.engine.hooked import HookedEncoder
from pastina.engine.readout import Part
from pastina.engine.reference import ReferenceEngine
from pastina.engine.rounding import draw_seed, make_keys
from pastina.heads import TaskModel
from pastina.methods.pasta import PastaLayer
from pastina.methods.placement import Frame

logger = logging.getLogger("pastina")

_METHODS = ("PASTA", "LINEAR")
_INPUTS = {"input_ids", "attention_mask", "token_type_ids"}


def why_not_packed(model: Any) -> str | None:
    """Why the packed engine cannot run this model; None: it can."""
    if isinstance(model, DistributedDataParallel):
        return "the model is spread over processes"
    task_model = _task_model(model)
    if task_model is None:
        return f"{type(model).__name__} holds no TaskModel"
    methods = {str(getattr(c.peft_type, "value", c.peft_type)) for c in _configs(model)}
    if unknown := sorted(methods - set(_METHODS)):
        return f"the method is {unknown[0]}, the packed engine knows {', '.join(_METHODS)}"
    if any(getattr(config, "at", "residual") != "residual" for config in _configs(model)):
        return "the vectors go to keys and values alone"
    if reason := why_not_frozen(task_model.backbone):
        return reason
    has_biases = any(getattr(config, "bias_layers", None) for config in _configs(model))
    return why_not_shifted(task_model.backbone) if has_biases else None


def _task_model(model: Any) -> TaskModel | None:
    return next((m for m in model.modules() if isinstance(m, TaskModel)), None)


def task_model_of(model: Any) -> TaskModel:
    """The TaskModel in a model that `why_not_packed` has nothing against."""
    task_model = _task_model(model)
    assert task_model is not None, "why_not_packed() was not asked"
    return task_model


def _configs(model: Any) -> list[Any]:
    return list(model.peft_config.values()) if isinstance(model, PeftModel) else []


class PackedEngine:
    """See the top of the file. What it cannot run right now goes through the reference engine.

    encoder: of the same backbone, to share with other engines; None: its own.
    """

    def __init__(
        self, model: Any, precision: Precision = "fp32", encoder: Encoder | None = None
    ) -> None:
        task_model = task_model_of(model)
        self.encoder: Encoder = encoder or Encoder(task_model.backbone, precision)
        self.precision: Precision = self.encoder.precision
        self.name = "packed" if self.precision == "fp32" else f"packed, {self.precision}"
        self.reference = ReferenceEngine(model, "fp32" if precision == "int8" else precision)
        self.task_model = task_model
        self.backbone: Any = task_model.backbone
        self._modules = self.backbone.get_submodule(self.encoder.family.layers)
        self._told: set[str] = set()

    def logits(self, batch: Batch) -> Tensor:
        """The logits of the batch's items, (N, C)."""
        states = self.states(batch)
        return self.reference.logits(batch) if states is None else self.task_model.head(states)

    def states(
        self, batch: Batch, lower: tuple[int, Sequence[Tensor]] | None = None
    ) -> Tensor | None:
        """What the head reads for each item, (N, H); None where the reference engine must step in.

        lower: a layer and its input for each row of the batch, (tokens, H), where that is known.
        """
        if reason := self.why_not_now(batch):
            self._tell(reason)
            return None
        joint = Joint(self.encoder, [batch])
        additions, seed = self.additions(batch, joint.places[0]), self.rounding_seed()
        if lower is None:
            return joint.states([additions], [self.task_model.pooling], None, [seed])[0]
        start, rows = lower
        hidden_PH = torch.cat([rows[row] for row in joint.packed.order_B.tolist()])
        known = (start, hidden_PH)
        return joint.states([additions], [self.task_model.pooling], known, [seed])[0]

    def lower_states(self, batch: Batch, stop: int) -> list[Tensor] | None:
        """For each row of the batch the input of layer `stop`, (tokens, H); None as for `states`."""
        if self.why_not_now(batch):
            return None
        packed = self.encoder.pack(_is_real(batch))
        hidden_PH = self.encoder.lower_states(batch.inputs, packed, stop)
        parts = hidden_PH.split(packed.length_B.tolist())
        return [parts[place] for place in packed.place_B.tolist()]

    def first_layer(self) -> int:
        """The lowest layer that adds vectors; the number of layers where none does."""
        for index, layer in enumerate(self._modules):
            if not isinstance(layer, PastaLayer) or layer.disable_adapters:
                continue
            if any(0 in layer.pasta_rows.get(name, ()) for name in layer.active_adapters):
                return index
        return self.num_layers

    @property
    def num_layers(self) -> int:
        """Of the backbone."""
        return len(self._modules)

    @property
    def hidden_size(self) -> int:
        """H of the backbone."""
        return self.backbone.config.hidden_size

    def why_not_now(self, batch: Batch) -> str | None:
        """Why this batch must go through the reference engine, with the model as it stands."""
        is_real_BT = _is_real(batch)
        if self.backbone.training:
            return "the backbone is in train mode, with its own dropout; see methods.train_mode"
        if torch.is_autocast_enabled(is_real_BT.device.type):
            return "autocast is on"
        if other := sorted(set(batch.inputs) - _INPUTS):
            return f"the batch holds {other[0]}"
        if any(len(layer.active_adapters) > 1 for layer in self._adapted()):
            return "more than one adapter is active"
        if self.task_model.pooling == "pooler" and not bool(is_real_BT[:, 0].all()):
            return "a row is padded on the left, where the pooler reads"
        if self.task_model.pooling == "tokens" and batch.items is None:
            return "all tokens are asked for"
        if batch.items is not None and not bool(is_real_BT[batch.items].all()):
            return "a word is asked for whose token is masked"
        return None if bool(is_real_BT.any(1).all()) else "a row has no token"

    def additions(self, batch: Batch, place_BT: Tensor) -> dict[int, Addition]:
        """What each layer adds, drawn as the reference draws it: `PastaLayer` itself is asked.

        place_BT: the packed token at each place of the batch, flat, below 0 at padding.
        """
        ids_BT = batch.inputs["input_ids"]
        frame = Frame(ids_BT, batch.inputs.get("attention_mask"))
        additions: dict[int, Addition] = {}
        seen: dict[int, tuple[Tensor, Tensor | None]] = {}
        every_P: Tensor | None = None  # all tokens, where some layer needs them
        for index, layer in enumerate(self._modules):
            if not isinstance(layer, PastaLayer) or layer.disable_adapters:
                continue
            for name in layer.active_adapters:
                if 0 not in layer.pasta_rows.get(name, ()):
                    continue
                rule, (num_rows, num_tokens) = layer.pasta_rule[name][0], ids_BT.shape
                placement = frame.place(rule, num_rows, num_tokens, ids_BT.device)
                if id(placement) not in seen:
                    seen[id(placement)] = spots(placement, place_BT[placement.index_BS])
                tokens_R, chosen = seen[id(placement)]
                _, delta_RH, scale_RH = layer.change(name, 0, placement, has_gaps=False)
                products, shifts = (), ()
                if every_P is None and (name in layer.pasta_downs or layer.pasta_bias_rows[name]):
                    every_P = place_BT[place_BT >= 0]
                if every_P is not None and 0 in layer.pasta_bias_rows[name]:
                    shifts = (Shift(every_P, layer.biases_of(name, 0)),)
                if every_P is not None and name in layer.pasta_downs:
                    down_HK, up_KH = layer.pasta_downs[name], layer.pasta_ups[name]
                    products = (Product(every_P, down_HK.float(), up_KH.float()),)
                delta_RH, scale_RH = _picked(delta_RH, chosen), _picked(scale_RH, chosen)
                additions[index] = Addition(tokens_R, delta_RH, scale_RH, products, shifts)
        frame.finish()
        return additions

    def rounding_seed(self) -> int | None:
        """Drawn for a batch whose gradients are rounded at random; None where none are."""
        return draw_seed() if self.precision == "int8" and torch.is_grad_enabled() else None

    def _tell(self, reason: str) -> None:
        if reason not in self._told:
            logger.info("The reference engine steps in for the packed one: %s.", reason)
            self._told.add(reason)

    def _adapted(self) -> list[PastaLayer]:
        return [layer for layer in self._modules if isinstance(layer, PastaLayer)]


class Joint:
    """Batches of several tasks on one backbone, packed into one.

    places: for each batch the packed token at each of its places, flat, below 0 at padding.
    """

    def __init__(self, encoder: Encoder | HookedEncoder, batches: Sequence[Batch]) -> None:
        self.encoder: Any = encoder  # what it packs only it can read
        self.batches = batches
        self.inputs, self.is_real_BT = _joined(batches)
        self.packed: Any = encoder.pack(self.is_real_BT)
        place_BT = self.packed.place_BT.view(self.is_real_BT.shape)
        self.rows: list[slice] = []
        self.places: list[Tensor] = []
        start = 0
        for batch in batches:
            num_rows, num_tokens = batch.inputs["input_ids"].shape
            self.rows.append(slice(start, start + num_rows))
            self.places.append(place_BT[self.rows[-1], :num_tokens].flatten())
            start += num_rows

    def states(
        self,
        additions: Sequence[Mapping[int, Addition]],
        poolings: Sequence[str],
        lower: tuple[int, Tensor] | None = None,
        seeds: Sequence[int | None] = (),
    ) -> list[Tensor]:
        """What the head of each batch reads, (N, H).

        lower: a layer and its input, if known. seeds: of each batch, see `PackedEngine.rounding_seed`.
        """
        parts = [
            Part(rows, pooling, _shifted(batch, rows.start))
            for batch, rows, pooling in zip(self.batches, self.rows, poolings, strict=True)
        ]
        known: dict[str, Any] = {} if lower is None else {"lower": lower}
        if any(seed is not None for seed in seeds):
            shapes = [tuple(batch.inputs["input_ids"].shape) for batch in self.batches]
            own = [seed or 0 for seed in seeds]
            known["keys_P"] = make_keys(own, shapes, self.places, self.packed.num_tokens)
        return self.encoder.states(self.inputs, self.packed, _merged(additions), parts, **known)


def _picked(numbers: Tensor | None, chosen: Tensor | None) -> Any:
    if numbers is None:
        return None
    return numbers.float() if chosen is None else numbers.float().index_select(0, chosen)


def _is_real(batch: Batch) -> Tensor:
    mask_BT = batch.inputs.get("attention_mask")
    if mask_BT is None:
        return torch.ones_like(batch.inputs["input_ids"], dtype=torch.bool)
    return mask_BT != 0


def _joined(batches: Sequence[Batch]) -> tuple[dict[str, Tensor], Tensor]:
    """The inputs of all batches in one, and which of its places are tokens."""
    if len(batches) == 1:
        return batches[0].inputs, _is_real(batches[0])
    longest = max(batch.inputs["input_ids"].shape[1] for batch in batches)

    def joined(tensors: list[Tensor]) -> Tensor:
        return torch.cat([F.pad(t, (0, longest - t.shape[1])) for t in tensors])

    inputs = {"input_ids": joined([batch.inputs["input_ids"] for batch in batches])}
    if any("token_type_ids" in batch.inputs for batch in batches):
        ids = [(batch.inputs["input_ids"], batch.inputs.get("token_type_ids")) for batch in batches]
        types = [torch.zeros_like(i) if t is None else t for i, t in ids]
        inputs["token_type_ids"] = joined(types)
    return inputs, joined([_is_real(batch) for batch in batches])


def _shifted(batch: Batch, first_row: int) -> tuple[Tensor, Tensor] | None:
    return None if batch.items is None else (batch.items[0] + first_row, batch.items[1])


def _merged(additions: Sequence[Mapping[int, Addition]]) -> Mapping[int, Addition]:
    if len(additions) == 1:
        return additions[0]
    return {
        index: joined([one[index] for one in additions if index in one])
        for index in sorted({index for one in additions for index in one})
    }

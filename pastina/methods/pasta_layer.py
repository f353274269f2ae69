"""A layer of the backbone that changes what it is given at the tokens of the slots.

Shape letters: B rows, T tokens, S slots, H hidden; V vectors of a layer (S, or fewer when slots share);
N = B * S places.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from pastina.errors import BackboneError, PastinaError
from pastina.methods._peft import Anything, check_row_names
from pastina.methods.biases import BiasPart, bias_parts, num_biases, shifted
from pastina.methods.pasta_config import PastaConfig
from pastina.methods.placement import Placement, SlotContext
from pastina.methods.rules import SlotRule


class Change(NamedTuple):
    """What a layer does to what it is given: h + delta + h * scale, at some of the B * T tokens."""

    index_N: Tensor
    delta_NH: Tensor
    scale_NH: Tensor | None

    def apply(self, hidden_BTH: Tensor) -> Tensor:
        """The changed states; a token that is named twice gets both."""
        # Cheaper than adding a dense [B, T, H]: one copy of hidden and N small additions, and
        # the gradient of hidden passes through untouched.
        flat, delta_NH = hidden_BTH.reshape(-1, hidden_BTH.shape[-1]), self.delta_NH
        if self.scale_NH is not None:
            delta_NH = delta_NH + flat[self.index_N] * self.scale_NH
        return flat.index_add(0, self.index_N, delta_NH.to(flat.dtype)).view(hidden_BTH.shape)


class Found(NamedTuple):
    """What is changed for one forward of a layer.

    outer: at its input. inner: at that of keys and values alone. products: added to all tokens of some
    rows (None: of all); biases: the same for the output of each part, (D,).
    """

    outer: list[Change]
    inner: list[Change]
    products: list[tuple[Tensor | None, Tensor]]
    biases: list[tuple[Tensor | None, Tensor]]


# what learns
TABLES = ("pasta_vectors", "pasta_scales", "pasta_downs", "pasta_ups", "pasta_biases")


class PastaLayer(nn.Module, BaseTunerLayer):
    """A layer of the backbone that adds vectors to what it is given; everything else is the layer's.

    `indexes` are the layers of the model that this module stands for: one, or all calls of a layer
    that is shared (ALBERT); then the parameters have the shape [calls, V, H] instead of [V, H].
    """

    adapter_layer_names = TABLES
    other_param_names = (
        "pasta_rule",
        "pasta_dropout",
        "pasta_rows",
        "pasta_bias_rows",
        "pasta_inside",
    )

    def __init__(
        self, base_layer: nn.Module, name: str, indexes: tuple[int, ...], context: SlotContext
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.layer_name = name
        self.indexes = indexes
        self.context = context
        self.pasta_vectors = nn.ParameterDict()
        self.pasta_scales = nn.ParameterDict()
        self.pasta_downs = nn.ParameterDict()
        self.pasta_ups = nn.ParameterDict()
        self.pasta_biases = nn.ParameterDict()
        self.pasta_rule: dict[str, dict[int, SlotRule]] = {}  # by call
        self.pasta_dropout: dict[str, float] = {}
        self.pasta_rows: dict[str, dict[int, int]] = {}  # call -> row of the parameter
        self.pasta_bias_rows: dict[str, dict[int, int]] = {}  # the same for the biases
        self.pasta_inside: dict[str, bool] = {}  # whether only keys and values are changed
        self._disable_adapters = False
        self.merged_adapters = []

    def __getattr__(self, name: str) -> Anything:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            # Models read attributes of their layers, such as ModernBERT's `attention_type`.
            return getattr(self.base_layer, name)

    def update_layer(self, adapter_name: str, config: PastaConfig, hidden_size: int) -> None:
        calls = [i for i in self.indexes if config.layers is None or i in config.layers]
        rules = {self.indexes.index(i): config.rule(i) for i in calls}
        rule = next(iter(rules.values()))
        leading = (len(calls),) if len(self.indexes) > 1 else ()
        first = next(self.base_layer.parameters())
        dtype = torch.promote_types(first.dtype, torch.float32)
        num_own = rule.num_vectors - rule.everywhere
        vectors = torch.empty((*leading, num_own, hidden_size), dtype=dtype, device=first.device)
        vectors = vectors.normal_(std=config.init_std)
        if rule.everywhere:  # starts at 0, where the plain method starts
            vectors = F.pad(vectors, (0, 0, 0, 1))
        self.pasta_vectors[adapter_name] = nn.Parameter(vectors)
        if config.scale:
            self.pasta_scales[adapter_name] = nn.Parameter(torch.zeros_like(vectors))
        if config.rank:  # starts at 0, as the product does with `up`
            down, up = (*leading, hidden_size, config.rank), (*leading, config.rank, hidden_size)
            downs = torch.empty(down, dtype=dtype, device=first.device).normal_(
                std=hidden_size**-0.5
            )
            self.pasta_downs[adapter_name] = nn.Parameter(downs)
            self.pasta_ups[adapter_name] = nn.Parameter(downs.new_zeros(up))
        with_biases = [call for call in rules if self.indexes[call] in (config.bias_layers or ())]
        if with_biases:  # start at 0, as every change of a bias does
            shape = (len(with_biases),) if leading else ()
            biases = vectors.new_zeros((*shape, num_biases(self.bias_parts)))
            self.pasta_biases[adapter_name] = nn.Parameter(biases)
        self.pasta_rule[adapter_name] = rules
        self.pasta_dropout[adapter_name] = config.dropout
        self.pasta_rows[adapter_name] = {call: row for row, call in enumerate(rules)}
        self.pasta_bias_rows[adapter_name] = {call: row for row, call in enumerate(with_biases)}
        self.pasta_inside[adapter_name] = config.at == "keys-values"
        if self.pasta_inside[adapter_name]:
            keys_and_values(
                self.base_layer, self.layer_name
            )  # complains, if it must, before training
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @property
    def bias_parts(self) -> list[BiasPart]:
        """The parts of the layer whose biases can learn, in order."""
        return bias_parts(self.base_layer, self.layer_name)

    def forward(
        self, *args: Anything, adapter_names: Sequence[str] | None = None, **kwargs: Anything
    ) -> Anything:
        if self.disable_adapters:
            return self.base_layer(*args, **kwargs)
        if not args and "hidden_states" not in kwargs:
            raise BackboneError(
                f"The layer {self.layer_name!r} was called without hidden states; seen the arguments "
                f"{sorted(kwargs)}. PASTA does not know this architecture."
            )
        hidden_BTH: Tensor = args[0] if args else kwargs["hidden_states"]
        found = self._changes(hidden_BTH, adapter_names)
        for change in found.outer:
            hidden_BTH = change.apply(hidden_BTH)
        for rows, product in found.products:
            hidden_BTH = (
                hidden_BTH + product if rows is None else hidden_BTH.index_add(0, rows, product)
            )
        with self._inside(found, len(hidden_BTH)):
            if args:
                return self.base_layer(hidden_BTH, *args[1:], **kwargs)
            return self.base_layer(**{**kwargs, "hidden_states": hidden_BTH})

    def _changes(self, hidden_BTH: Tensor, adapter_names: Sequence[str] | None) -> Found:
        frame = self.context.running()
        call = frame.next_call(self.layer_name) if len(self.indexes) > 1 else 0
        if hidden_BTH.dim() != 3:
            raise BackboneError(
                f"The layer {self.layer_name!r} got hidden states of the shape "
                f"{tuple(hidden_BTH.shape)}; PASTA needs [rows, tokens, hidden]."
            )
        num_rows, num_tokens, _ = hidden_BTH.shape
        found = Found([], [], [], [])
        wanted: dict[str, Tensor | None] = dict.fromkeys(self.active_adapters)
        if adapter_names is not None:
            check_row_names(adapter_names, num_rows)
            wanted = {**frame.rows_of(adapter_names, hidden_BTH.device)}
        for name, rows in wanted.items():
            if call not in self.pasta_rows.get(name, ()):
                continue
            rule = self.pasta_rule[name][call]
            place = frame.place(rule, num_rows, num_tokens, hidden_BTH.device)
            if rows is not None:
                vector_BS = None if place.vector_BS is None else place.vector_BS[rows]
                place = Placement(place.index_BS[rows], place.present_BS1[rows], vector_BS)
            change = self.change(name, call, place)
            (found.inner if self.pasta_inside[name] else found.outer).append(change)
            if name in self.pasta_downs:
                own_BTH = hidden_BTH if rows is None else hidden_BTH[rows]
                found.products.append((rows, self._product(own_BTH, name, call)))
            if call in self.pasta_bias_rows[name]:
                found.biases.append((rows, self.biases_of(name, call)))
        if adapter_names is not None:
            return found._replace(outer=_joined(found.outer), inner=_joined(found.inner))
        return found

    def _product(self, hidden_BTH: Tensor, name: str, call: int) -> Tensor:
        """h @ D @ U, in the precision of h."""
        down_HR, up_RH = self.pasta_downs[name], self.pasta_ups[name]
        if len(self.indexes) > 1:
            row = self.pasta_rows[name][call]
            down_HR, up_RH = down_HR[row], up_RH[row]
        return (hidden_BTH @ down_HR.to(hidden_BTH.dtype) @ up_RH.to(hidden_BTH.dtype)).to(
            hidden_BTH.dtype
        )

    def biases_of(self, name: str, call: int) -> Tensor:
        """What is added to the outputs of the parts, (D,)."""
        biases = self.pasta_biases[name]
        return biases[self.pasta_bias_rows[name][call]] if len(self.indexes) > 1 else biases

    def change(self, name: str, call: int, place: Placement, *, has_gaps: bool = True) -> Change:
        """What an adapter does at these places; draws the dropout, in train mode.

        has_gaps: False: whoever asks leaves out himself what a row has no slot for.
        """
        delta_BSH = self._pick(self.pasta_vectors[name], name, call, place)
        share = self.pasta_dropout[name]
        scale_BSH = None
        if name in self.pasta_scales:
            scale_BSH = self._pick(self.pasta_scales[name], name, call, place)
            kept_BSH = F.dropout(torch.ones_like(delta_BSH), share, self.training)
            delta_BSH, scale_BSH = delta_BSH * kept_BSH, scale_BSH * kept_BSH
        else:
            delta_BSH = F.dropout(delta_BSH, share, self.training)
        if has_gaps:
            delta_BSH = torch.where(place.present_BS1, delta_BSH, 0.0)
            if scale_BSH is not None:
                scale_BSH = torch.where(place.present_BS1, scale_BSH, 0.0)
        scale_NH = None if scale_BSH is None else scale_BSH.flatten(0, 1)
        return Change(place.index_BS.reshape(-1), delta_BSH.flatten(0, 1), scale_NH)

    def _pick(self, numbers_VH: Tensor, name: str, call: int, place: Placement) -> Tensor:
        if len(self.indexes) > 1:
            numbers_VH = numbers_VH[self.pasta_rows[name][call]]
        if place.vector_BS is None:
            return numbers_VH.expand(*place.index_BS.shape, -1)
        return F.embedding(place.vector_BS, numbers_VH)

    @contextmanager
    def _inside(self, found: Found, num_rows: int) -> Iterator[None]:
        """Meanwhile what the keys and the values are made of is changed, and what the parts put out."""
        if not found.inner and not found.biases:
            yield
            return
        if self.training and getattr(self.base_layer, "gradient_checkpointing", False):
            what = 'at="keys-values"' if found.inner else "bias_layers"
            raise BackboneError(
                f"{what} does not go with gradient checkpointing, which runs the layer again "
                "without the change. Turn checkpointing off, or leave it out."
            )

        def before(module: nn.Module, args: Anything) -> Anything:
            states = args[0]
            for change in found.inner:
                states = change.apply(states)
            return (states, *args[1:])

        def after(part: BiasPart, module: nn.Module, args: Anything, output: Tensor) -> Tensor:
            for rows, values_D in found.biases:
                output = shifted(output, rows, values_D[part.place], num_rows)
            return output

        with ExitStack() as stack:
            if found.inner:
                for module in keys_and_values(self.base_layer, self.layer_name):
                    stack.callback(module.register_forward_pre_hook(before).remove)
            for part in self.bias_parts if found.biases else ():
                stack.callback(part.module.register_forward_hook(partial(after, part)).remove)
            yield

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        # PEFT looks for `base_layer.weight`, which a whole layer does not have.
        target = device or next(self.base_layer.parameters()).device
        for numbers in (getattr(self, table) for table in TABLES):
            if adapter_name in numbers and (own := numbers[adapter_name]).device.type != "meta":
                numbers[adapter_name] = nn.Parameter(
                    own.detach().to(target), requires_grad=own.requires_grad
                )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        cannot_merge()

    def unmerge(self) -> NoReturn:
        cannot_merge()


_KEYS_VALUES = ("key", "value", "k_lin", "v_lin", "k_proj", "v_proj", "k", "v")


def keys_and_values(layer: nn.Module, name: str) -> Sequence[nn.Module]:
    """The two projections of a layer that make the keys and the values of its attention.

    Raises:
        BackboneError: they are not found, or in one with the queries.
    """
    found = [
        module
        for path, module in layer.named_modules()
        if path.rpartition(".")[2] in _KEYS_VALUES and isinstance(module, nn.Linear)
    ]
    if len(found) != 2:
        raise BackboneError(
            f'at="keys-values" needs a layer with one projection for keys and one for values; seen '
            f'{len(found)} such in {name!r} ({type(layer).__name__}). Take at="residual".'
        )
    return found


def _joined(changes: list[Change]) -> list[Change]:
    """Changes of different rows as one."""
    if len(changes) < 2:
        return changes
    has_scales = any(change.scale_NH is not None for change in changes)
    scales = [
        torch.zeros_like(c.delta_NH) if c.scale_NH is None else c.scale_NH
        for c in changes
        if has_scales
    ]
    return [
        Change(
            torch.cat([change.index_N for change in changes]),
            torch.cat([change.delta_NH for change in changes]),
            torch.cat(scales) if scales else None,
        )
    ]


def cannot_merge() -> NoReturn:
    raise PastinaError(
        "PASTA cannot be merged into the weights: what it adds depends on the position of a token, "
        "not on a weight. It costs one small addition per layer, so nothing is lost by keeping it; "
        "unload() gives the plain model back."
    )

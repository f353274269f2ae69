"""Where the slots of a running batch are, and how the layers of a backbone get to know it.

Shape letters: B rows, T tokens, S slots.
"""

import inspect
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pastina.errors import BackboneError, DataError
from pastina.methods._peft import NO_ADAPTER, Anything
from pastina.methods.ordinary import rank_ordinary
from pastina.methods.rules import SlotRule
from pastina.slots import check_slots, rank_special_tokens


class Placement(NamedTuple):
    """Where the slots of a batch are: the places of all rows one after the other."""

    index_BS: Tensor  # of the slot's token among all tokens of the batch
    present_BS1: Tensor  # False where the row has no such slot
    vector_BS: Tensor | None  # which vector the slot takes; None: the slot's own, or the only one


class Frame:
    """What one forward of the backbone was given, and the placements found in it so far."""

    def __init__(self, input_ids_BT: Tensor | None, attention_mask_BT: Tensor | None) -> None:
        self.input_ids_BT = input_ids_BT
        self.attention_mask_BT = attention_mask_BT
        self.placements: dict[SlotRule, Placement] = {}
        self.rows: dict[str, Tensor] = {}
        self.calls: dict[str, int] = {}
        self.late_checks: list[tuple[Tensor, torch.cuda.Event, Tensor, int]] = []

    def place(
        self, rule: SlotRule, num_rows: int, num_tokens: int, device: torch.device
    ) -> Placement:
        if rule not in self.placements:
            if self.input_ids_BT is not None and rule.special_token_ids:
                found = self._place_ids(rule, self.input_ids_BT)
            else:
                found = _place_fixed(rule, num_rows, num_tokens, device)
            self.placements[rule] = self._chosen(rule, found, num_rows, num_tokens)
        placement = self.placements[rule]
        if self.input_ids_BT is not None and self.input_ids_BT.shape != (num_rows, num_tokens):
            raise BackboneError(
                f"A layer got hidden states of {num_rows} x {num_tokens} tokens for input_ids of "
                f"{tuple(self.input_ids_BT.shape)}. PASTA needs one hidden state per input token."
            )
        return placement

    def _place_ids(self, rule: SlotRule, input_ids_BT: Tensor) -> Placement:
        rank_BT, token_BT = rank_special_tokens(
            input_ids_BT, rule.special_token_ids, self.attention_mask_BT
        )
        self._check(rank_BT, rule.num_slots)
        if rule.positions != "special":
            rank_BT = rank_ordinary(input_ids_BT, rank_BT, self.attention_mask_BT, rule.positions)
        num_rows, num_tokens = rank_BT.shape
        device = rank_BT.device
        # A token writes its place into the column of its rank; column 0 collects the others.
        place_BT = torch.arange(num_tokens, device=device).expand(num_rows, num_tokens)
        column_BT = rank_BT.clamp(max=rule.num_slots)
        blank = torch.zeros(num_rows, rule.num_slots + 1, dtype=torch.int64, device=device)
        place_BS = blank.scatter(1, column_BT, place_BT)[:, 1:]
        rank_S = torch.arange(1, rule.num_slots + 1, device=device)
        present_BS1 = (rank_BT.amax(dim=1, keepdim=True) >= rank_S).unsqueeze(-1)
        start_B1 = torch.arange(num_rows, device=device).unsqueeze(1) * num_tokens
        vector_BS = None
        if rule.by_token:
            vector_BS = (token_BT.gather(1, place_BS) - 1).clamp(min=0)
        return Placement(place_BS + start_B1, present_BS1, vector_BS)

    def _chosen(
        self, rule: SlotRule, placement: Placement, num_rows: int, num_tokens: int
    ) -> Placement:
        """The slots that have a vector, and behind them every token where the rule says so."""
        index_BS, present_BS1, vector_BS = placement
        device = index_BS.device
        if rule.chosen is not None:
            index_BS, present_BS1 = index_BS[:, rule.chosen], present_BS1[:, rule.chosen]
        if not rule.everywhere:
            return Placement(index_BS, present_BS1, vector_BS)
        if vector_BS is None:
            vector_S = torch.arange(rule.num_columns, device=device) * (not rule.is_shared)
            vector_BS = vector_S.expand(num_rows, -1)
        place_BT = torch.arange(num_rows * num_tokens, device=device).view(num_rows, num_tokens)
        is_real_BT = torch.ones_like(place_BT, dtype=torch.bool)
        if self.attention_mask_BT is not None:
            is_real_BT = self.attention_mask_BT != 0
        return Placement(
            torch.cat([index_BS, place_BT], 1),
            torch.cat([present_BS1, is_real_BT.unsqueeze(-1)], 1),
            torch.cat([vector_BS, torch.full_like(place_BT, rule.num_vectors - 1)], 1),
        )

    def _check(self, rank_BT: Tensor, num_slots: int) -> None:
        if torch.compiler.is_compiling():
            torch.ops.aten._assert_async.msg(
                (rank_BT <= num_slots).all(), f"a row has more than {num_slots} special tokens"
            )
        elif rank_BT.device.type == "cuda":
            # Asking now would wait for the GPU before its work is queued: ask at the end.
            too_many = (rank_BT > num_slots).any().to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self.late_checks.append((too_many, event, rank_BT, num_slots))
        else:
            check_slots(rank_BT, num_slots)

    def finish(self) -> None:
        for too_many, event, rank_BT, num_slots in self.late_checks:
            event.synchronize()
            if bool(too_many):
                check_slots(rank_BT, num_slots)

    def rows_of(self, names: Sequence[str], device: torch.device) -> dict[str, Tensor]:
        """The row numbers of every adapter that is not NO_ADAPTER."""
        if not self.rows:
            for name in dict.fromkeys(names):
                rows = [row for row, other in enumerate(names) if other == name]
                if name != NO_ADAPTER:
                    self.rows[name] = torch.tensor(rows, device=device)
        return self.rows

    def next_call(self, layer_name: str) -> int:
        call = self.calls.get(layer_name, 0)
        self.calls[layer_name] = call + 1
        return call


def _place_fixed(rule: SlotRule, num_rows: int, num_tokens: int, device: torch.device) -> Placement:
    if not rule.fixed_positions:
        raise DataError(
            "PASTA finds the special tokens by input_ids, but this forward got none "
            "(inputs_embeds only?). Pass input_ids, or name the positions of the slots by "
            "PastaConfig(fixed_positions=[...])."
        )
    if not all(-num_tokens <= p < num_tokens for p in rule.fixed_positions):
        raise DataError(
            f"fixed_positions={list(rule.fixed_positions)} does not fit an input of {num_tokens} "
            "tokens."
        )
    place_S = [p % num_tokens for p in rule.fixed_positions]
    missing = rule.num_slots - len(place_S)
    place_BS = torch.tensor([place_S + [0] * missing], device=device).expand(num_rows, -1)
    present_S = torch.arange(rule.num_slots, device=device) < len(place_S)
    start_B1 = torch.arange(num_rows, device=device).unsqueeze(1) * num_tokens
    return Placement(
        place_BS + start_B1, present_S.expand(num_rows, -1).unsqueeze(-1), vector_BS=None
    )


class SlotContext:
    """Tells the layers of one backbone about its running forward; set and cleared by two hooks."""

    def __init__(self, host: nn.Module) -> None:
        self.parameters = tuple(inspect.signature(host.forward).parameters)
        self.frame: Frame | None = None
        self.hooks = (
            host.register_forward_pre_hook(self.enter, with_kwargs=True),
            host.register_forward_hook(self.leave, always_call=True),
        )

    def enter(self, module: nn.Module, args: Anything, kwargs: Anything) -> None:
        ids, mask = (self._argument(n, args, kwargs) for n in ("input_ids", "attention_mask"))
        self.frame = Frame(ids, mask)

    def leave(self, module: nn.Module, args: Anything, output: Anything) -> None:
        frame, self.frame = self.frame, None
        if frame is not None:
            frame.finish()

    def _argument(self, name: str, args: Anything, kwargs: Anything) -> Tensor | None:
        if name in kwargs or name not in self.parameters:
            return kwargs.get(name)
        index = self.parameters.index(name)
        return args[index] if index < len(args) else None

    def running(self) -> Frame:
        if self.frame is None:
            raise BackboneError(
                "A PASTA layer was called outside the forward of its backbone, so its special tokens "
                "are not known. Call the whole model."
            )
        return self.frame

"""The settings of PASTA and its variants; the defaults are the published method."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from peft import PeftConfig

from pastina.errors import RecipeError
from pastina.methods._peft import Anything
from pastina.methods.checks import (
    check_flag,
    check_number,
    check_whole,
    check_word,
    checked_heads,
    checked_integers,
    checked_names,
)
from pastina.methods.rules import POSITIONS, SHARE, SLOTS, SlotRule, make_rule

AT = ("residual", "keys-values")
MOST_EXTRA, MOST_RANK = 64, 256


@dataclass
class PastaConfig(PeftConfig):
    """Settings of one PASTA adapter; what is None is found when the adapter is put on a model."""

    special_token_ids: Sequence[int] | None = None
    """Ids that count as special; None: those of the model's tokenizer or config."""
    num_slots: int | None = None
    """How many special tokens a row may hold; None: as many as a pair has."""
    share: str = "none"
    """"none": a vector per slot; "by_token": per special token; "all": one for all slots."""
    layers: Sequence[int] | None = None
    """The layers that get vectors, counted from 0; None: all."""
    init_std: float = 0.02
    """Standard deviation of the first vectors; 0 starts at the frozen backbone."""
    dropout: float = 0.1
    """On the added vectors."""
    fixed_positions: Sequence[int] | None = None
    """Slots of inputs that have no token ids, such as [0] for the class token of an image model."""
    slots: str | Sequence[int] = "all"
    """The slots that have vectors: "all"; "first": the first of a row, [CLS]; "rest": all but that one;
    or a list, counted from 0."""
    layer_slots: Sequence[int] | None = None
    """For each layer the one slot that has a vector there, counted from 0; None: as `slots` says."""
    positions: str = "special"
    """"special"; as a control "first": the first ordinary tokens of a row, or "random": ordinary tokens
    drawn by the row's ids. A row gets as many vectors as it has special tokens, if it has the tokens."""
    everywhere: bool = False
    """One more vector in each layer, for every token."""
    scale: bool = False
    """A learned factor beside each vector: h becomes h + h * s + v."""
    rank: int = 0
    """A change of every token's state by a product of itself, of this rank: h @ D @ U is added as well;
    0: none."""
    bias_layers: Sequence[int] | None = None
    """The layers, counted from 0, of whose products and norms the biases learn as well (BitFit), without
    those of the keys, which change nothing; None: of none."""
    at: str = "residual"
    """"residual": into the layer, residual branch included; "keys-values": only into what the keys and
    values of the attention are made of."""
    extra_tokens: int = 0
    """Special tokens behind the template's own, each with a slot; who makes the inputs appends them."""
    modules_to_save: list[str] | None = None
    """Modules that learn in full and are stored with the adapter: the head."""
    target_modules: Sequence[str] | None = None
    """Names of the layers in order; None: found."""
    peft_type: str | None = field(default="PASTA")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "PASTA"
        self.modules_to_save = checked_heads(self.modules_to_save)
        lists = {"special_token_ids": 0, "layers": 0, "bias_layers": 0, "fixed_positions": None}
        for name, least in lists.items():
            if (value := getattr(self, name)) is not None:
                setattr(self, name, checked_integers(name, value, least))
        if self.target_modules is not None:
            self.target_modules = checked_names(
                "target_modules", self.target_modules, "layer names"
            )
        check_word("share", self.share, SHARE)
        if self.num_slots is not None:
            check_whole("num_slots", self.num_slots, 1)
        check_number("init_std", self.init_std, "a number from 0", lambda x: x >= 0)
        check_number("dropout", self.dropout, "at least 0 and below 1", lambda x: 0 <= x < 1)
        if self.fixed_positions is not None:
            self._check_fixed_positions(self.fixed_positions)
        self._check_variant()

    def to_dict(self) -> dict[str, Anything]:
        """What is stored: no variant that is not used, so the plain method's files stay as they were."""
        values = super().to_dict()
        return {k: v for k, v in values.items() if k not in PLAIN or v != PLAIN[k]}

    def rule(self, layer: int = 0) -> SlotRule:
        """The rule of a layer, when ids and slots are known."""
        return make_rule(
            self.special_token_ids or (),
            self.num_slots or len(self.fixed_positions or ()),
            share=self.share,
            fixed_positions=self.fixed_positions or (),
            slots=self.slots if self.layer_slots is None else (self.layer_slots[layer],),
            positions=self.positions,
            everywhere=self.everywhere,
        )

    def _check_fixed_positions(self, positions: Sequence[int]) -> None:
        if self.share == "by_token":
            raise RecipeError(
                'share="by_token" needs token ids; with fixed_positions use "none" or "all".'
            )
        if self.num_slots is not None and len(positions) > self.num_slots:
            raise RecipeError(
                f"fixed_positions={list(positions)} needs {len(positions)} slots; "
                f"seen num_slots={self.num_slots}."
            )

    def _check_variant(self) -> None:
        if isinstance(self.slots, str):
            check_word("slots", self.slots, SLOTS)
        else:
            self.slots = checked_integers("slots", self.slots, least=0)
        if self.layer_slots is not None:
            self.layer_slots = _of_each_layer(self.layer_slots)
        check_word("positions", self.positions, POSITIONS)
        check_word("at", self.at, AT)
        check_flag("everywhere", self.everywhere)
        check_flag("scale", self.scale)
        check_whole("rank", self.rank, 0, MOST_RANK)
        check_whole("extra_tokens", self.extra_tokens, 0, MOST_EXTRA)
        if complaint := clash(self):
            raise RecipeError(f"{complaint}.")


# The variants' settings, with what the published method has.
PLAIN: dict[str, Anything] = {
    "slots": "all",
    "layer_slots": None,
    "positions": "special",
    "everywhere": False,
    "scale": False,
    "rank": 0,
    "bias_layers": None,
    "at": "residual",
    "extra_tokens": 0,
}


def clash(settings: Anything) -> str | None:
    """Which two settings of a config, or of a recipe's method, do not go together; None: they do."""
    chooses = settings.slots != "all" or settings.layer_slots is not None
    if settings.layer_slots is not None:
        if settings.slots != "all":
            return "slots and layer_slots both choose slots; leave one out"
        if settings.layers is not None:
            return "layer_slots names a slot for each layer; leave out layers"
        if settings.share != "none":
            return f"layer_slots leaves one vector in a layer; leave out share={settings.share!r}"
    if settings.share == "by_token" and (chooses or settings.positions != "special"):
        return (
            'share="by_token" goes by the special token, not by the slot or position; choose tokens by '
            "special_token_ids"
        )
    layers = settings.layers
    if layers is not None and (bare := [i for i in settings.bias_layers or () if i not in layers]):
        return (
            f"bias_layers names layer {bare[0]}, which has no vectors by layers={list(layers)}; name it "
            "in both, or leave it out"
        )
    if settings.rank and settings.at != "residual":
        return (
            f"rank changes the states that the whole layer is given; leave out at={settings.at!r}"
        )
    is_fixed = getattr(settings, "fixed_positions", None) is not None
    if is_fixed and (settings.positions != "special" or settings.extra_tokens):
        return "fixed_positions names the positions already; leave out positions and extra_tokens"
    return None


def _of_each_layer(slots: Anything) -> tuple[int, ...]:
    is_list = isinstance(slots, list | tuple) and len(slots) > 0
    if not is_list or any(type(slot) is not int or slot < 0 for slot in slots):
        raise RecipeError(
            f"layer_slots must name a slot, a whole number from 0, for each layer; seen {slots!r}."
        )
    return tuple(slots)

"""Many tasks on one backbone, in memory: all vectors in one tensor, all heads in another.

Adding, replacing and removing a task costs the same however many there are. A batch that is running
keeps the tasks it began with: numbers that it reads are not written over before it has let go of them.

Shape letters: V vectors of a layer, H hidden, C outputs.
"""

import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from pastina.adapter import Card, Content, check_fits, read_content
from pastina.backbones import Backbone, max_positions
from pastina.errors import AdapterError, DataError, RecipeError
from pastina.files import CARD, CONFIG, WEIGHTS
from pastina.heads import POOLINGS
from pastina.kinds import KINDS
from pastina.methods.biases import bias_parts, num_biases, pad_to_rows
from pastina.methods.layers import Layers, find_layers
from pastina.methods.pasta_config import MOST_EXTRA, MOST_RANK, clash
from pastina.methods.rules import SlotRule, make_rule
from pastina.nearest import nearest
from pastina.slots import template_slots
from pastina.table import Rows, Table

_PEFT_TYPES = {"pasta": "PASTA", "linear": "LINEAR"}  # the methods that leave the backbone alone
_HEAD = ("base_model.model.classifier.weight", "base_model.model.classifier.bias")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_LARGEST = 1e30  # as of a target in the data


@dataclass(frozen=True, slots=True)
class VectorPlan:
    """How the vectors of a task are used; tasks with equal plans are worked on together.

    layers: the layers that have vectors, in the order of the rows; rules: of each of them.
    extra_tokens: special tokens that are written again behind each input. rank: of the products.
    bias_layers: those with biases of the task's own, at most num_biases numbers in bias_rows rows each,
    behind the rows of all layers.
    """

    rules: tuple[SlotRule, ...]
    layers: tuple[int, ...]
    extra_tokens: int = 0
    rank: int = 0
    bias_layers: tuple[int, ...] = ()
    num_biases: int = 0
    bias_rows: int = 0

    @property
    def rule(self) -> SlotRule:
        """What all layers have in common: which tokens are special, how many a row may hold."""
        return self.rules[0]

    @property
    def num_vectors(self) -> int:
        """V."""
        return self.rules[0].num_vectors

    @property
    def num_rows(self) -> int:
        """Rows of a layer: its vectors, then the columns of `down` and the rows of `up`."""
        return self.num_vectors + 2 * self.rank

    def biases(self, table: Tensor, start: int, layer: int) -> Tensor:
        """What a task whose rows begin at `start` adds to the biases of a layer, (D,), with
        zeros behind it where another layer has more."""
        first = start + len(self.layers) * self.num_rows
        first += self.bias_layers.index(layer) * self.bias_rows
        return table[first : first + self.bias_rows].flatten()[: self.num_biases]


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter in memory that was found to fit the backbone.

    vectors: the rows of each layer of the plan, then those of the biases, (rows, H). head: weights with
    the bias behind them, (C, H + 1).
    """

    card: Card
    plan: VectorPlan | None
    vectors: Tensor | None
    head: Tensor


@dataclass(frozen=True, slots=True)
class Task:
    """A task in a bank; what it says stays true while somebody holds it.

    The fields from kind to target_std are those of the adapter's card; plan, vectors and head those
    of `Adapter`. num_layers: of the backbone that the task uses, from below.
    """

    name: str
    digest: str
    kind: str
    labels: tuple[str, ...]
    is_pair: bool
    pooling: str
    max_length: int
    stride: int
    target_mean: float
    target_std: float
    num_layers: int
    plan: VectorPlan | None
    vectors: Rows | None
    head: Rows


class Bank:
    """The tasks of one backbone. Any thread may add and remove while others read.

    Raises:
        AdapterError: an adapter is broken, of another backbone, or of a method that needs its own.
        DataError: there is no such task.
    """

    def __init__(self, backbone: Backbone, device: torch.device | str = "cpu") -> None:
        self.backbone = backbone
        self.layers: Layers = find_layers(backbone.model)
        device = torch.device(device)
        self.vectors = Table(self.layers.hidden_size, device)
        self.heads = Table(self.layers.hidden_size + 1, device)
        self._num_special = [template_slots(backbone.tokenizer, pair) for pair in (False, True)]
        self._tasks: dict[str, Task] = {}
        self._kept: dict[
            Any, tuple[Any, int]
        ] = {}  # labels and plans, and how many tasks have them
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._tasks)

    def __contains__(self, name: object) -> bool:
        return name in self._tasks

    def __iter__(self) -> Iterator[Task]:
        return iter(list(self._tasks.values()))

    def __getitem__(self, name: str) -> Task:
        if (task := self._tasks.get(name)) is None:
            raise self._unknown(name)
        return task

    def add(self, folder: Path | str, name: str | None = None) -> Task:
        """Read an adapter; a task of this name is replaced for batches that begin from now on.

        name: None: the one in the adapter's card.
        """
        return self.put(self.read(folder), name)

    def read(self, folder: Path | str) -> Adapter:
        """The adapter in this folder, checked; the bank stays as it is."""
        folder = Path(folder)
        return self.check(read_content(folder), folder)

    def check(self, content: Content, folder: Path) -> Adapter:
        """The adapter of these files; `folder` is what messages call them."""
        card = content.card
        if card.method not in _PEFT_TYPES:
            raise AdapterError(
                f"{folder} was trained with {card.method!r}, which works inside the backbone. A bank "
                f"holds vectors and heads, those of {', '.join(_PEFT_TYPES)}; pastina.load() loads this "
                "one alone."
            )
        check_fits(folder, card, self.backbone)
        config = _read_config(folder, content.config, card.method)
        if complaint := self._complaint(card, config.extra_tokens):
            raise AdapterError(f"{folder / CARD}: {complaint}.")
        tensors = _read_tensors(folder, content.weights)
        plan, shapes = self._plan(folder, card, config)
        num_outputs, hidden = len(KINDS[card.kind].outputs(card.labels)), self.layers.hidden_size
        shapes |= zip(_HEAD, ((num_outputs, hidden), (num_outputs,)), strict=True)
        _check_shapes(folder, tensors, shapes)
        weight, bias = (tensors[key].float() for key in _HEAD)
        head = torch.cat([weight, bias.unsqueeze(1)], 1)
        rows = None if plan is None else _rows(tensors, shapes, hidden, plan.bias_rows)
        if not (_is_finite(head) and (rows is None or _is_finite(rows))):
            key = next(key for key in shapes if not _is_finite(tensors[key].float()))
            raise AdapterError(
                f"{folder}: {key} holds numbers that are not finite. Train again with a lower rate."
            )
        return Adapter(card, plan, rows, head)

    def put(self, adapter: Adapter, name: str | None = None) -> Task:
        """Take in an adapter that was read; see `add`."""
        card, vectors = adapter.card, adapter.vectors
        with self._lock:
            rows = None if vectors is None else self.vectors.write(vectors)
            head = self.heads.write(adapter.head)
            task = Task(
                name=name or card.name,
                digest=card.digest,
                kind=sys.intern(card.kind),
                labels=self._keep(card.labels),
                is_pair=card.is_pair,
                pooling=sys.intern(card.pooling),
                max_length=card.max_length,
                stride=card.stride,
                target_mean=card.target_mean,
                target_std=card.target_std,
                num_layers=self._depth(card),
                plan=self._keep(adapter.plan),
                vectors=rows,
                head=head,
            )
            old = self._tasks.get(task.name)
            self._tasks[task.name] = task
            self._forget(old)
        return task

    def remove(self, name: str) -> None:
        """Forget a task; batches that run on it end as they began."""
        with self._lock:
            task = self._tasks.pop(name, None)
            self._forget(task)
        if task is None:
            raise self._unknown(name)

    def _unknown(self, name: str) -> DataError:
        near = nearest(name, list(self._tasks))
        hint = f" Did you mean {near!r}?" if near else ""
        return DataError(f"There is no task {name[:200]!r} among {len(self)}.{hint}")

    def _keep(self, value: Any) -> Any:
        kept, uses = self._kept.get(value, (value, 0))
        self._kept[kept] = (kept, uses + 1)
        return kept

    def _forget(self, task: Task | None) -> None:
        for value in () if task is None else (task.labels, task.plan):
            kept, uses = self._kept.pop(value)
            if uses > 1:
                self._kept[kept] = (kept, uses - 1)

    def _complaint(self, card: Card, extra_tokens: int) -> str | None:
        """Why rows cannot be read and answered as this card says."""
        if not KINDS[card.kind].outputs(card.labels):
            return "labels: there are none"
        if len(set(card.labels)) < len(card.labels):
            return "labels: one of them is there twice"
        depth, there = self._depth(card), self.layers.num_layers
        if depth > there or (card.backbone.num_layers is None and self.backbone.num_layers):
            wanted = card.backbone.num_layers or "all"
            return f"num_layers: it wants {wanted} layers of the backbone, which has {there} here"
        if depth < there and any(len(calls) > 1 for calls in self.layers.indexes):
            return "num_layers: the backbone's layers are called several times each"
        if depth < there and card.pooling == "pooler":
            return "pooling: the pooler belongs to the last layer, which is left out"
        if card.pooling not in (("tokens",) if card.kind == "tag" else POOLINGS):
            return f"pooling: {card.pooling!r} does not go with the kind {card.kind}"
        if card.pooling == "pooler" and getattr(self.backbone.model, "pooler", None) is None:
            return "pooling: the pooler is read, and the backbone was loaded without one"
        if not (abs(card.target_mean) <= _LARGEST and abs(card.target_std) <= _LARGEST):
            return f"target: {card.target_mean} and {card.target_std} are not both usable numbers"
        limit, room = max_positions(self.backbone.model), card.max_length
        if limit is not None and card.max_length > limit:
            return f"max_length: {card.max_length}, but the backbone reads at most {limit} tokens"
        room -= self._num_special[card.is_pair] + extra_tokens
        if room <= card.is_pair:
            return f"max_length: {card.max_length} leaves no room beside the special tokens"
        if card.kind == "tag" and not 0 <= card.stride < room:
            return f"stride: {card.stride} does not go with windows of {room} tokens of text"
        return None

    def _plan(
        self, folder: Path, card: Card, config: "_Config"
    ) -> tuple[VectorPlan | None, dict[str, tuple[int, ...]]]:
        """How the vectors are used, and the shape of each tensor that holds some, in order."""
        if card.method == "linear":
            return None, {}
        prefix, num_layers = self.backbone.model.base_model_prefix, self._depth(card)
        if complaint := config.complaint(num_layers, self._layer_names()[:num_layers]):
            raise AdapterError(f"{folder / CONFIG}: {complaint}.")
        try:
            rules = [config.rule(card, layer) for layer in range(num_layers)]
        except RecipeError as error:
            raise AdapterError(f"{folder / CONFIG}: {error}") from None
        num_vectors = rules[0].num_vectors
        wanted = range(num_layers) if config.layers is None else config.layers
        shapes: dict[str, tuple[int, ...]] = {}
        layers: list[int] = []
        hidden = self.layers.hidden_size
        tables = {"pasta_vectors": (num_vectors, hidden)}
        if config.rank:
            tables |= {"pasta_downs": (hidden, config.rank), "pasta_ups": (config.rank, hidden)}
        for name, calls in zip(self.layers.names, self.layers.indexes, strict=True):
            if own := [call for call in calls if call in wanted]:
                for table, shape in tables.items():
                    key = f"base_model.model.{prefix}.{name}.{table}"
                    shapes[key] = shape if len(calls) == 1 else (len(own), *shape)
                layers += own
        own_rules = tuple(rules[layer] for layer in layers)
        plan = VectorPlan(own_rules, tuple(layers), config.extra_tokens, config.rank)
        if config.bias_layers is None:
            return plan, shapes
        own = self._biases(config.bias_layers, shapes)
        return replace(plan, **own), shapes

    def _biases(self, wanted: Sequence[int], shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
        """What a plan says of biases; the shapes of their tensors are added."""
        model, layers = self.backbone.model, []
        most = 0
        for name, calls in zip(self.layers.names, self.layers.indexes, strict=True):
            if own := [call for call in calls if call in wanted]:
                count = num_biases(bias_parts(model.get_submodule(name), name))
                key = f"base_model.model.{model.base_model_prefix}.{name}.pasta_biases"
                shapes[key] = (count,) if len(calls) == 1 else (len(own), count)
                layers += own
                most = max(most, count)
        rows = -(-most // self.layers.hidden_size)
        return {"bias_layers": tuple(layers), "num_biases": most, "bias_rows": rows}

    def _depth(self, card: Card) -> int:
        return card.backbone.num_layers or self.layers.num_layers

    def _layer_names(self) -> tuple[str, ...]:
        prefix = self.backbone.model.base_model_prefix
        return tuple(f"{prefix}.{name}" for name in self.layers.names)


_Id = Annotated[int, Field(ge=0, lt=2**31)]


class _Config(BaseModel):
    """What a bank reads of PEFT's config; the rest says how the adapter was trained."""

    model_config = ConfigDict(frozen=True, strict=True)

    peft_type: str
    special_token_ids: tuple[_Id, ...] | None = None
    num_slots: Annotated[int, Field(ge=1)] | None = None
    share: Literal["none", "by_token", "all"] = "none"
    layers: tuple[_Id, ...] | None = None
    slots: Literal["all", "first", "rest"] | tuple[_Id, ...] = "all"
    layer_slots: tuple[_Id, ...] | None = None
    positions: Literal["special", "first", "random"] = "special"
    everywhere: bool = False
    scale: bool = False
    rank: Annotated[int, Field(ge=0, le=MOST_RANK)] = 0
    bias_layers: tuple[_Id, ...] | None = None
    at: Literal["residual", "keys-values"] = "residual"
    extra_tokens: Annotated[int, Field(ge=0, le=MOST_EXTRA)] = 0
    target_modules: tuple[str, ...] | str | None = None

    def complaint(self, num_layers: int, names: tuple[str, ...]) -> str | None:
        """Why the vectors of this adapter cannot be used beside those of others."""
        ids, layers = self.special_token_ids, self.layers
        if ids is None or self.num_slots is None:
            return "special_token_ids and num_slots do not say which tokens have vectors"
        slots = None if isinstance(self.slots, str) else self.slots
        lists = {"special_token_ids": ids, "layers": layers, "slots": slots}
        lists["bias_layers"] = self.bias_layers
        for field, values in lists.items():
            if values is not None and (not values or len(set(values)) < len(values)):
                return f"{field}: {list(values)} are not different numbers"
        for field in ("layers", "bias_layers"):
            if max(lists[field] or (0,)) >= num_layers:
                seen = list(lists[field] or ())
                return f"{field}: {seen}, but the backbone has {num_layers} layers"
        if self.target_modules not in (None, names):
            return "target_modules: these are not the layers of the backbone in order"
        if self.layer_slots is not None and len(self.layer_slots) != num_layers:
            return f"layer_slots: {len(self.layer_slots)}, but the backbone has {num_layers} layers"
        if self.scale or self.at != "residual":
            what = "scales states" if self.scale else "changes keys and values alone"
            return f"this variant {what}, which a bank cannot hold; pastina.load() loads it alone"
        return clash(self)

    def rule(self, card: Card, layer: int) -> SlotRule:
        """Where the vectors of a layer go."""
        num_slots = self.num_slots or 0
        has_subset = self.slots != "all" or self.layer_slots is not None
        # No text has more tokens than max_length: what is above costs memory and means nothing.
        if self.share != "none" or has_subset:
            num_slots = min(num_slots, card.max_length)
        return make_rule(
            self.special_token_ids or (),
            num_slots,
            share=self.share,
            slots=self.slots if self.layer_slots is None else self.layer_slots[layer : layer + 1],
            positions=self.positions,
            everywhere=self.everywhere,
        )


def _read_config(folder: Path, content: bytes, method: str) -> _Config:
    try:
        config = _Config.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise AdapterError(f"{folder / CONFIG}: {where}: {first['msg']}.") from None
    if config.peft_type != _PEFT_TYPES[method]:
        raise AdapterError(
            f"{folder / CONFIG} is of {config.peft_type[:200]!r}, the card says {method!r}."
        )
    return config


def _read_tensors(folder: Path, content: bytes) -> dict[str, Tensor]:
    from safetensors.torch import load

    try:
        return load(content)
    except Exception as error:  # a broken file can make anything fail in there
        raise AdapterError(f"{folder / WEIGHTS} is broken: {error!r}.") from None


def _check_shapes(
    folder: Path, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Nothing, if there are these tensors and no others."""
    path = folder / WEIGHTS
    for key in shapes.keys() ^ tensors.keys():
        what = "lacks the tensor" if key in shapes else "holds an unknown tensor,"
        raise AdapterError(f"{path} {what} {key[:200]!r}.")
    for key, shape in shapes.items():
        own = tensors[key]
        if own.shape != shape or own.dtype not in _DTYPES:
            raise AdapterError(
                f"{path}: {key!r} is {own.dtype} of the shape {tuple(own.shape)}, expected are floats "
                f"of the shape {shape}."
            )


def _rows(
    tensors: Mapping[str, Tensor], keys: Iterable[str], hidden: int, bias_rows: int
) -> Tensor:
    """The rows of all layers: vectors, columns of `down`, rows of `up`; then those of all biases."""
    keys = list(keys)
    layers = [key.removesuffix(".pasta_vectors") for key in keys if key.endswith("_vectors")]
    rows: list[Tensor] = []
    for layer in layers:
        own = [tensors[f"{layer}.pasta_vectors"]]
        if (down := f"{layer}.pasta_downs") in keys:
            own += [tensors[down].mT, tensors[f"{layer}.pasta_ups"]]
        rows.append(torch.cat([table.float() for table in own], -2).reshape(-1, hidden))
    biases = [tensors[key].float() for key in keys if key.endswith("_biases")]
    return torch.cat(rows + [pad_to_rows(own, bias_rows, hidden) for own in biases])


def _is_finite(numbers: Tensor) -> bool:
    return bool(torch.isfinite(numbers).all())


def split_by_plan(tasks: Sequence[Task]) -> list[tuple[VectorPlan, list[int]]]:
    """The plans, and for each the places of its tasks in the sequence; tasks without vectors are left
    out. Tasks of one bank have their plans in common: equal ones are one."""
    found: dict[int, tuple[VectorPlan, list[int]]] = {}
    for i, task in enumerate(tasks):
        if task.plan is not None:
            found.setdefault(id(task.plan), (task.plan, []))[1].append(i)
    return list(found.values())

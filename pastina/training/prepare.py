"""From a recipe to what the loop needs: backbone, examples, scales, weights, an untrained model."""

import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from pastina.backbones import Backbone, load_backbone, max_positions, with_same_weights
from pastina.data.encode import Example, encode
from pastina.data.read import load_dataset
from pastina.data.rows import Dataset, Row
from pastina.engine.batching import check_slots, count_items
from pastina.errors import BackboneError, DataError, RecipeError
from pastina.heads import TaskModel
from pastina.kinds import KINDS, Kind, class_weights, main_metric
from pastina.method_options import TokensOptions
from pastina.methods import attach, num_prompts
from pastina.recipe import PastaOptions, Recipe
from pastina.slots import special_ids, template_slots
from pastina.training.events import Note, OnEvent
from pastina.training.score import Scorer
from pastina.training.teacher import Teacher, ask_teacher

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything about a run that does not change while it goes on.

    model: the PeftModel that learns. examples: of the training part. weights: one per output of the
    head, or None. rows_key: the same for runs whose encoded rows are the same. target_scale: (mean,
    standard deviation) of a regression's training targets.
    """

    recipe: Recipe
    kind: Kind
    data: Dataset
    metric: str
    backbone: Backbone
    pooling: str
    is_pair: bool
    target_scale: tuple[float, float]
    model: Any
    examples: list[Example]
    rows_key: str
    weights: torch.Tensor | None
    scorer: Scorer
    teacher: Teacher | None = None

    @property
    def pad_id(self) -> int:
        """The token id that fills up short rows."""
        return self.backbone.tokenizer.pad_token_id

    def trained(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that learn, by name."""
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}


_KEPT = 32  # parts of data sets that a shared source keeps for members that are still to come


class Source:
    """Where runs get backbones and data from. Runs that share a source read and tokenise them once.

    Of data only what was asked for last is kept, so that a fleet on many data sets does not hold all.
    """

    def __init__(self, *, is_shared: bool = False) -> None:
        self.is_shared = is_shared
        self._backbones: dict[str, Backbone] = {}
        self._known: OrderedDict[str, Any] = OrderedDict()

    def backbone(self, recipe: Recipe) -> Backbone:
        """The backbone of a recipe; of a shared source with modules of its own and shared weights."""
        if not self.is_shared:
            return load_backbone(recipe.backbone, keep_pooler=_keep_pooler(recipe))
        key = repr(recipe.backbone)
        if key not in self._backbones:
            self._backbones[key] = load_backbone(recipe.backbone, keep_pooler=True)
        backbone = self._backbones[key]
        model = with_same_weights(backbone.model)
        # As a run of its own has it: a method must not find parts to train. What the packed engine runs
        # shares an encoder, with the pooler for those who want it.
        is_packed = recipe.method.name in ("pasta", "linear")
        if not is_packed and _pooling(recipe, backbone) != "pooler":
            model.pooler = None
        return replace(backbone, model=model)

    def dataset(self, recipe: Recipe) -> Dataset:
        """The rows of a recipe."""
        fit = recipe.fit
        return self.once(
            f"data {recipe.kind} {recipe.data!r} {fit.seed}",
            lambda: load_dataset(recipe.kind, recipe.data, fit.seed),
        )

    def once(self, key: str, make: Callable[[], T]) -> T:
        """What `make` gives; of a shared source made once for each key."""
        if not self.is_shared:
            return make()
        if key not in self._known:
            self._known[key] = make()
            while len(self._known) > _KEPT:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return self._known[key]


def prepare(recipe: Recipe, on_event: OnEvent, source: Source | None = None) -> Prepared:
    """Read the data, load the backbone, build the model. `recipe` is a resolved one.

    Raises:
        DataError, BackboneError, RecipeError: as `pastina.train` says.
    """
    source = source or Source()
    kind = KINDS[recipe.kind]
    data = source.dataset(recipe)
    metric = main_metric(kind, recipe.fit.metric, data.labels)
    backbone = source.backbone(recipe)
    pooling = _pooling(recipe, backbone)
    _check_length(recipe, backbone)
    is_pair = any(row.text_pair is not None for row in data.train)
    ids = _special_ids(recipe, backbone)
    extra_tokens = _extra_tokens(recipe)
    num_slots = getattr(recipe.method, "num_slots", None) or (
        template_slots(backbone.tokenizer, is_pair) + extra_tokens
    )
    target_scale = _target_scale(data)
    rows_key = f"{data.digest} {recipe.kind} {recipe.backbone!r} {recipe.data!r} {extra_tokens}"

    def encoded(part: str) -> list[Example]:
        rows: Sequence[Row] = getattr(data, part)
        examples = source.once(
            f"{part} {rows_key}", lambda: _encode(recipe, data, backbone, rows, target_scale)
        )
        if isinstance(recipe.method, PastaOptions | TokensOptions):
            _check_special(examples, ids, extra_tokens)
        if isinstance(recipe.method, PastaOptions):
            check_slots(examples, rows, ids, num_slots)
        return examples

    examples = encoded("train")
    _tell_truncated(examples, recipe, on_event)
    counts = _count_outputs(examples, kind, data.labels)
    weights = class_weights(
        kind, data.labels, recipe.fit.class_weights, counts, sum(map(count_items, examples))
    )
    scorer = Scorer(
        kind,
        data.labels,
        data.dev,
        encoded("dev"),
        pad_id=backbone.tokenizer.pad_token_id,
        target_scale=target_scale,
    )
    teacher = None
    if recipe.fit.teacher is not None:
        key = f"teacher {recipe.fit.teacher} {recipe.fit.precision} {rows_key}"
        teacher = source.once(key, lambda: ask_teacher(recipe, kind, data, examples, target_scale))
    model = _build_model(recipe, kind, data, backbone, pooling, ids, num_slots)
    return Prepared(
        recipe,
        kind,
        data,
        metric,
        backbone,
        pooling,
        is_pair,
        target_scale,
        model,
        examples,
        rows_key,
        weights,
        scorer,
        teacher,
    )


def _keep_pooler(recipe: Recipe) -> bool | None:
    if recipe.kind == "tag":
        return False
    return None if recipe.head.pooling == "auto" else recipe.head.pooling == "pooler"


def _pooling(recipe: Recipe, backbone: Backbone) -> str:
    if recipe.kind == "tag":
        if recipe.head.pooling != "auto":
            raise RecipeError(
                f"head.pooling = {recipe.head.pooling!r} means nothing for a tagger, which reads "
                "every word. Remove it."
            )
        return "tokens"
    return backbone.pooling if recipe.head.pooling == "auto" else recipe.head.pooling


def _check_length(recipe: Recipe, backbone: Backbone) -> None:
    spec = recipe.data
    if recipe.kind == "tag" and spec.stride > spec.max_length // 2:
        raise RecipeError(
            f"data.stride = {spec.stride} is more than half of data.max_length = {spec.max_length}. "
            "Lower data.stride."
        )
    limit, wanted = max_positions(backbone.model), spec.max_length
    prompts = num_prompts(recipe.method)
    if limit is not None and wanted + prompts > limit:
        behind = f" behind {prompts} learned ones" if prompts else ""
        raise BackboneError(
            f"data.max_length = {wanted}{behind}, but {recipe.backbone.name} reads at most {limit} "
            "tokens. Lower data.max_length."
        )


def _special_ids(recipe: Recipe, backbone: Backbone) -> tuple[int, ...]:
    wanted = getattr(recipe.method, "special_token_ids", None)
    return wanted or special_ids(backbone.tokenizer)


def _extra_tokens(recipe: Recipe) -> int:
    return getattr(recipe.method, "extra_tokens", 0)


def _encode(
    recipe: Recipe,
    data: Dataset,
    backbone: Backbone,
    rows: Sequence[Row],
    target_scale: tuple[float, float],
) -> list[Example]:
    examples = encode(
        rows,
        backbone.tokenizer,
        recipe.kind,
        data.labels,
        max_length=recipe.data.max_length,
        stride=recipe.data.stride,
        extra_tokens=_extra_tokens(recipe),
    )
    if recipe.kind == "regress":
        mean, deviation = target_scale
        return [replace(e, target=(_number(e) - mean) / deviation) for e in examples]
    return examples


def _check_special(examples: Sequence[Example], ids: tuple[int, ...], extra_tokens: int) -> None:
    """Vectors that no token ever takes would teach nothing, without a word."""
    if extra_tokens and examples[0].input_ids[-1] not in ids:
        raise RecipeError(
            f"The extra tokens are {examples[0].input_ids[-1]}, which is not one of the special tokens "
            f"{list(ids)}. Correct or leave out method.special_token_ids."
        )
    if not any(token in ids for example in examples for token in example.input_ids):
        raise RecipeError(
            f"No text holds one of the special tokens {list(ids)}. Correct or leave out "
            "method.special_token_ids."
        )


def _number(example: Example) -> float:
    assert isinstance(example.target, float)
    return example.target


def _tell_truncated(examples: Sequence[Example], recipe: Recipe, on_event: OnEvent) -> None:
    if num_truncated := sum(example.truncated for example in examples):
        on_event(
            Note(
                f"{num_truncated} of {len(examples)} training texts are longer than data.max_length "
                f"= {recipe.data.max_length} tokens and were cut."
            )
        )


def _build_model(
    recipe: Recipe,
    kind: Kind,
    data: Dataset,
    backbone: Backbone,
    pooling: str,
    ids: tuple[int, ...],
    num_slots: int,
) -> Any:
    task_model = TaskModel(
        backbone.model,
        len(kind.outputs(data.labels)),
        pooling=pooling,
        dropout=recipe.head.dropout,
        seed=recipe.fit.seed,
    )
    torch.manual_seed(recipe.fit.seed)  # the vectors' first values
    return attach(
        task_model,
        recipe.method,
        special_token_ids=ids,
        num_slots=num_slots,
        modules_to_save=["classifier"],
        task_type=kind.task_type,
    )


def _target_scale(data: Dataset) -> tuple[float, float]:
    values = [row.label for row in data.train if isinstance(row.label, float)]
    if not values:
        return 0.0, 1.0
    if len(set(values)) == 1:
        raise DataError(
            f"Every training row has the target {values[0]:g}, so there is nothing to learn. Check the "
            "label column."
        )
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
    return mean, deviation


def _count_outputs(examples: Sequence[Example], kind: Kind, labels: Sequence[str]) -> Counter[str]:
    """How often each output of the head is the right one."""
    outputs = kind.outputs(labels)
    counts: Counter[str] = Counter()
    for example in examples:
        target: Any = example.target
        if kind.name == "classify":
            counts[outputs[target]] += 1
        elif kind.name == "tag":
            counts.update(outputs[tag] for tag in target)
        elif kind.name == "multilabel":
            counts.update(o for o, is_set in zip(outputs, target, strict=True) if is_set)
    return counts

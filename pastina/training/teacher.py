"""What another run answers for the training rows: worked out once, to learn from.

Shape letters: N items (rows, or words of a tagger), C outputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pastina.answering import checked_row
from pastina.answers import word_logits
from pastina.data.encode import Example
from pastina.data.rows import Dataset, Row
from pastina.engine.batching import example_logits
from pastina.errors import RecipeError
from pastina.kinds import Kind
from pastina.predict import Predictor, load
from pastina.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Teacher:
    """digest: of the teacher's adapter. logits: of each training example, (N, C), in its own outputs."""

    digest: str
    logits: list[Tensor]


def ask_teacher(
    recipe: Recipe,
    kind: Kind,
    data: Dataset,
    examples: Sequence[Example],
    target_scale: tuple[float, float],
) -> Teacher:
    """The answers of the run (or adapter) in fit.teacher for these examples of the training rows.

    The teacher may have another backbone and tokenizer: texts are put to it, not tokens.

    Raises:
        RecipeError: it is of another kind, or of other labels.
        AdapterError, BackboneError: it cannot be loaded. DataError: it cannot read the rows.
    """
    assert recipe.fit.teacher is not None
    wanted = recipe.fit.precision
    # int8 is of the packed engine alone, and a teacher need not be a method that it knows
    teacher = load(recipe.fit.teacher, precision="auto" if wanted == "int8" else wanted)
    card = teacher.card
    if card.kind != kind.name:
        raise RecipeError(
            f"The teacher {recipe.fit.teacher} answers {card.kind}, the recipe is of the kind "
            f"{kind.name}. Name a run of the same task."
        )
    own, theirs = kind.outputs(data.labels), kind.outputs(card.labels)
    if set(own) != set(theirs):
        other = sorted(set(own) ^ set(theirs))[0]
        raise RecipeError(
            f"The teacher {recipe.fit.teacher} has other labels than the data: {other!r} is known to "
            "one of them alone. Name a run that was trained with these labels."
        )
    order = torch.tensor([theirs.index(output) for output in own])
    answers = [logits[:, order] for logits in _answers(teacher, kind, data.train)]
    if kind.name == "regress":
        mean, deviation = target_scale
        scale, shift = card.target_std / deviation, (card.target_mean - mean) / deviation
        answers = [logits * scale + shift for logits in answers]
    return Teacher(card.digest, [_of_example(answers, example) for example in examples])


def _answers(teacher: Predictor, kind: Kind, rows: Sequence[Row]) -> list[Tensor]:
    """For each row its logits, (1, C), or those of its words."""
    rows = [checked_row(row, teacher.card) for row in rows]
    examples = teacher.encode(rows)
    pad_id = teacher.tokenizer.pad_token_id
    logits = example_logits(teacher.engine, examples, pad_id, teacher.device)
    return word_logits(rows, examples, logits) if kind.name == "tag" else logits


def _of_example(answers: Sequence[Tensor], example: Example) -> Tensor:
    logits = answers[example.row]
    return logits if example.word_index is None else logits[example.word_index]

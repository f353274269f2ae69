"""The bodies of requests and answers."""

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)

from pastina.serve.settings import MOST_TEXTS

_STRICT = ConfigDict(extra="forbid", frozen=True, strict=True)
# The first item that is wrong ends the reading: a body may hold a million of them, and to say of each
# what is wrong would take seconds and gigabytes.
_MANY = Field(min_length=1, max_length=MOST_TEXTS, fail_fast=True)


def _shown(*examples: dict[str, Any]) -> ConfigDict:
    return ConfigDict(json_schema_extra={"examples": list(examples)})


class Pair(BaseModel):
    """Two texts that are read together."""

    model_config = _STRICT

    text: str
    text_pair: str


Input = str | Pair


def _whole(value: Any) -> Any:
    """To JSON 5.0 is a whole number as well."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Count = Annotated[int, BeforeValidator(_whole), Field(ge=1)]
TopK = Annotated[
    Count | None,
    Field(description="How many of the best labels `scores` lists; null: all of them."),
]
Threshold = Annotated[
    float | None,
    Field(
        ge=0,
        le=1,
        description="Labels and spans below it are left out. multilabel: 0.5 if it is left out.",
    ),
]


class PredictBody(BaseModel):
    """Texts for one task."""

    model_config = _STRICT | _shown(
        {"inputs": "Where is my parcel?", "top_k": 3},
        {"inputs": ["Where is my parcel?", "Please cancel my order"]},
        {"inputs": {"text": "How old is it?", "text_pair": "It was built in 1901."}},
    )

    inputs: Input | Annotated[list[Input], _MANY]
    top_k: TopK = 5
    threshold: Threshold = None


class Item(BaseModel):
    """A text that names its own task."""

    model_config = _STRICT

    task: str
    inputs: Input
    top_k: TopK = 5
    threshold: Threshold = None


def _item_or_error(value: Any, read: ValidatorFunctionWrapHandler) -> Item | ValidationError:
    try:
        return read(value)
    except ValidationError as error:
        return error


class MixedBody(BaseModel):
    """Texts for any tasks. An item that cannot be read is kept as what is wrong with it."""

    model_config = _STRICT | _shown(
        {
            "items": [
                {"task": "acme/intents", "inputs": "Where is my parcel?"},
                {"task": "acme/orders", "inputs": "Two lamps by 3 March, please"},
            ]
        }
    )

    items: Annotated[
        list[Annotated[Item, WrapValidator(_item_or_error)]],
        Field(
            min_length=1,
            max_length=MOST_TEXTS,
            description="One that is of another form gets an error in its place.",
        ),
    ]


class TeiBody(BaseModel):
    """What clients of text-embeddings-inference send to `/predict`."""

    model_config = ConfigDict(
        frozen=True, strict=True, json_schema_extra={"examples": [{"inputs": "I like it"}]}
    )

    inputs: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=2)]
        | Annotated[list[Annotated[list[str], Field(min_length=1, max_length=2)]], _MANY]
    )
    raw_scores: bool = Field(
        False, description="True: the scores before softmax or sigmoid; a number stays as it is."
    )
    truncate: bool | None = False
    truncation_direction: Literal["Left", "Right", "left", "right"] = Field(
        "Right", description="Left: of texts that are too long the start is left out."
    )


_ANSWER: dict[str, Any] = {
    "task": "acme/intents",
    "digest": "5b1c...",
    "kind": "classify",
    "label": "track_order",
    "score": 0.91,
    "scores": [{"label": "track_order", "score": 0.91}],
}
_ERROR: dict[str, Any] = {
    "error": {
        "code": "unknown_task",
        "message": "There is no task 'acme/intent'.",
        "near": ["acme/intents"],
        "request_id": "0d6b6e2f",
    }
}
_TASK: dict[str, Any] = {
    "name": "acme/intents",
    "kind": "classify",
    "num_labels": 2,
    "method": "pasta",
    "is_pair": False,
    "max_length": 128,
    "digest": "5b1c...",
    "metrics": {"dev": {"accuracy": 0.93}},
    "bytes": 26336,
    "backbone": "sentence-transformers/all-MiniLM-L6-v2",
    "created": "2026-03-01T12:00:00Z",
    "version": "0.1.0",
}


class LabelScore(BaseModel):
    """A label and how sure the task is of it."""

    label: str
    score: float


class EntitySpan(BaseModel):
    """A stretch of the text: characters start (inclusive) to end (exclusive)."""

    entity_group: str
    score: float
    word: str
    start: int
    end: int


class Answer(BaseModel):
    """The answer for one text. The kind of the task says which fields are there.

    classify: label, score, scores. multilabel: labels, scores. regress: value. tag: entities.
    """

    model_config = _shown(_ANSWER)

    task: str
    digest: str = Field(description="Of the adapter that answered: SHA-256.")
    kind: Literal["classify", "multilabel", "regress", "tag"]
    label: str | None = Field(
        None, description="The best label; null if it is below the threshold."
    )
    score: float | None = None
    scores: list[LabelScore] | None = None
    labels: list[LabelScore] | None = None
    value: float | None = None
    entities: list[EntitySpan] | None = None
    truncated: bool | None = Field(None, description="True: the end of the text was not read.")


class ErrorBody(BaseModel):
    """What went wrong. code: for programs; message: for people."""

    model_config = _shown(_ERROR)

    error: dict[str, Any]


class TeiError(BaseModel):
    """What went wrong, as text-embeddings-inference says it."""

    model_config = _shown({"error": "inputs must not be empty", "error_type": "Validation"})

    error: str
    error_type: Literal["Validation", "Overloaded", "Unhealthy", "Backend"]


class ItemError(BaseModel):
    """A text that could not be answered; the others were."""

    error: dict[str, Any]


class Answers(BaseModel):
    """An answer for each text, in order."""

    model_config = _shown({"answers": [_ANSWER]})

    answers: list[Answer]


class MixedAnswers(BaseModel):
    """An answer or an error for each item, in order."""

    model_config = _shown({"answers": [_ANSWER, _ERROR]})

    answers: list[Answer | ItemError]


class TaskInfo(BaseModel):
    """A task. refused: why the adapter that lies there now cannot be used; then the one before it goes
    on answering, and without one before there is no digest."""

    model_config = _shown({**_TASK, "labels": ["track_order", "cancel_order"]})

    name: str
    kind: str | None = None
    num_labels: int | None = None
    labels: list[str] | None = Field(None, description="Only where one task is asked for.")
    method: str | None = None
    is_pair: bool | None = None
    max_length: int | None = None
    digest: str | None = None
    metrics: dict[str, dict[str, float | None]] | None = None
    bytes: int | None = None
    backbone: str | None = None
    created: str | None = None
    version: str | None = None
    refused: str | None = None


class TaskList(BaseModel):
    """Tasks in order of their names. total: how many match, listed or not."""

    model_config = _shown({"tasks": [_TASK], "total": 1})

    tasks: list[TaskInfo]
    total: int


class Installed(BaseModel):
    """An adapter that was taken in."""

    model_config = _shown({"task": "acme/intents", "digest": "5b1c...", "replaced": False})

    task: str
    digest: str
    replaced: bool

"""The routes that answer texts."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from pydantic import ValidationError

from pastina.serve.access import Caller
from pastina.serve.bodies import check_query, parsed, problem_of
from pastina.serve.documents import TASK, body_of, errors
from pastina.serve.frame import TEI
from pastina.serve.link import Answer, Text
from pastina.serve.refusals import Refusal, json_response
from pastina.serve.render import label_scores, render
from pastina.serve.schemas import (
    Answers,
    Input,
    Item,
    MixedAnswers,
    MixedBody,
    PredictBody,
    TeiBody,
    TeiError,
)
from pastina.serve.server import Server

router = APIRouter(tags=["predict"])
_NEAR = 3  # unknown tasks of a request for which names like theirs are looked for
PREDICT = "/v1/tasks/{task:path}/predict"
_LABELS: dict[str, Any] = {
    "type": "array",
    "items": {"$ref": "#/components/schemas/LabelScore"},
}
_TEI_ANSWERS = {"oneOf": [_LABELS, {"type": "array", "minItems": 1, "items": _LABELS}]}
Timeout = Annotated[
    float | None,
    Query(ge=0.001, le=3600, allow_inf_nan=False, description="Seconds to wait at most."),
]


@router.post(
    PREDICT,
    responses={200: {"model": Answers}, **errors(404, 408, 413, 504)},
    openapi_extra=body_of(PredictBody),
)
async def predict(request: Request, task: TASK, timeout: Timeout = None) -> Response:
    """Answer one text, one pair of texts, or a list of them."""
    check_query(request, "timeout")
    server: Server = request.app.state.server
    caller = server.caller(request)
    settings = server.settings
    body = await parsed(request, PredictBody, settings.max_body, settings.read_s)
    server.check_ready()
    info = _asked(server, caller, task)
    is_list = isinstance(body.inputs, list)
    texts = [_text(task, one) for one in (body.inputs if is_list else [body.inputs])]  # type: ignore[union-attr]
    server.check_number(len(texts))
    for place, text in enumerate(texts):
        _check(server, text, info["is_pair"], _where(is_list, place))
    request.scope["texts"] = len(texts)
    found = await server.answers(request, caller, texts, timeout)
    answers = []
    for place, ((_, text, _), answer) in enumerate(zip(texts, found, strict=True)):
        if "refused" in answer:
            raise server.refusal(answer, place, _where(is_list, place))
        answers.append(render(answer, text, body.top_k, body.threshold))
    return json_response({"answers": answers})


@router.post(
    "/v1/predict",
    responses={200: {"model": MixedAnswers}, **errors(408, 413, 504)},
    openapi_extra=body_of(MixedBody),
)
async def predict_mixed(request: Request, timeout: Timeout = None) -> Response:
    """Answer texts that each name their own task, in order; one that cannot be answered gets an error
    in its place."""
    check_query(request, "timeout")
    server: Server = request.app.state.server
    caller = server.caller(request)
    settings = server.settings
    body = await parsed(request, MixedBody, settings.max_body, settings.read_s)
    server.check_ready()
    server.check_number(len(body.items))
    server.take_from(caller, len(body.items))  # whatever is in them: names can be guessed by asking
    texts, results = _readable(server, caller, body.items)
    request.scope["texts"] = len(texts)
    found = await _paid_answers(server, request, caller, texts, len(body.items), timeout)
    for sent, (place, answer) in enumerate(zip(texts, found, strict=True)):
        item = body.items[place]
        if "refused" in answer:
            refusal = server.refusal(answer, sent, f"items[{place}].inputs")
            results[place] = _item_error(server, refusal)
        else:
            results[place] = render(answer, texts[place][1], item.top_k, item.threshold)
    return json_response({"answers": [results[place] for place in range(len(body.items))]})


def _readable(
    server: Server, caller: Caller, items: Sequence[Item | ValidationError]
) -> tuple[dict[int, Text], dict[int, Any]]:
    """By their places, the texts that can be asked, and the errors of the other items."""
    texts: dict[int, Text] = {}
    failures: dict[int, Any] = {}
    num_unknown = 0
    for place, item in enumerate(items):
        try:
            if isinstance(item, ValidationError):
                raise Refusal("invalid", f"{problem_of(item, f'items[{place}]')}.")
            # looking for names takes a while among thousands, and the others wait meanwhile
            is_first = num_unknown < _NEAR
            num_unknown += item.task not in server.link.tasks or not caller.may_call(item.task)
            info = server.answering_task(caller, item.task, with_near=is_first)
            text = _text(item.task, item.inputs)
            _check(server, text, info["is_pair"], f"items[{place}].inputs")
        except Refusal as refusal:
            failures[place] = _item_error(server, refusal)
        else:
            texts[place] = text
    return texts, failures


async def _paid_answers(
    server: Server,
    request: Request,
    caller: Caller,
    texts: Mapping[int, Text],
    num_paid: int,
    seconds: float | None,
) -> Sequence[Answer]:
    """The engine's answers in order, for a caller of whom so many texts were counted already."""
    if not texts:
        return []
    try:
        return await server.answers(request, caller.paid(), list(texts.values()), seconds)
    except Refusal as refusal:
        if refusal.code == "queue_full":
            caller.give_back(num_paid)
        raise


@router.post(
    TEI,
    responses={
        200: {
            "description": "For one text a list of labels, for a batch a list of such lists",
            "content": {"application/json": {"schema": _TEI_ANSWERS}},
        },
        **errors(404, 408, 413, 504, kind=TeiError),
    },
    openapi_extra=body_of(TeiBody),
)
async def predict_tei(request: Request) -> Response:
    """Answer as text-embeddings-inference does, by the server's default task."""
    check_query(request)
    server: Server = request.app.state.server
    caller = server.caller(request)
    settings, name = server.settings, server.settings.default_task
    body = await parsed(request, TeiBody, settings.max_body, settings.read_s)
    if name is None:
        raise Refusal("unknown_task", "There is no default task. Start with --default-task NAME.")
    server.check_ready()
    info = _asked(server, caller, name)
    if info["kind"] == "tag":
        raise _spans(name)
    inputs = body.inputs
    is_batch = isinstance(inputs, list) and isinstance(inputs[0], list)
    rows: list[Any] = list(inputs) if is_batch else [inputs]
    texts = [_tei_text(name, [row] if isinstance(row, str) else row) for row in rows]
    server.check_number(len(texts))
    for place, text in enumerate(texts):
        _check(server, text, info["is_pair"], _where(is_batch, place))
    request.scope["texts"] = len(texts)
    is_left = body.truncation_direction.lower() == "left"
    found = await server.answers(
        request, caller, texts, None, is_raw=body.raw_scores, keep_end=is_left
    )
    for place, answer in enumerate(found):
        if "refused" in answer:
            raise server.refusal(answer, place, _where(is_batch, place))
        if answer.get("truncated") and not body.truncate:
            raise Refusal("too_large", f"inputs must have at most {info['max_length']} tokens")
        if answer["kind"] == "tag":  # the task was replaced since it was asked
            raise _spans(name)
    answers = [label_scores(answer) for answer in found]
    return json_response(answers if is_batch else answers[0])


def _spans(name: str) -> Refusal:
    return Refusal("invalid", f"{name!r} finds spans; ask /v1/tasks/{name}/predict.")


def _text(task: str, given: Input) -> Text:
    return (task, given, None) if isinstance(given, str) else (task, given.text, given.text_pair)


def _tei_text(task: str, texts: list[str]) -> Text:
    return (task, texts[0], texts[1] if len(texts) > 1 else None)


def _where(is_list: bool, place: int) -> str:
    """What a client calls this text."""
    return f"inputs[{place}]" if is_list else "inputs"


def _asked(server: Server, caller: Caller, task: str) -> Mapping[str, Any]:
    """What is known of the task; to ask for one that is not there counts as a text."""
    try:
        return server.answering_task(caller, task)
    except Refusal:
        server.take_from(caller, 1)
        raise


def _check(server: Server, text: Text, is_pair: bool, where: str) -> None:
    """Nothing, if it is short enough, and a pair where the task reads pairs, else a single text."""
    server.check_size(text, where)
    if (text[2] is not None) != is_pair:
        wanted, seen = ("pairs", "one text") if is_pair else ("single texts", "a pair")
        raise Refusal("unreadable", f"{text[0]!r} reads {wanted}, and {where} is {seen}.")


def _item_error(server: Server, refusal: Refusal) -> dict[str, Any]:
    server.metrics.rejected.labels(refusal.code).inc()
    return {"error": {"code": refusal.code, "message": refusal.message, **refusal.extra}}

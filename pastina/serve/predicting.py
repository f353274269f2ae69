"""The routes that answer texts."""

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from pastina.serve.bodies import parsed
from pastina.serve.documents import TASK, body_of, errors
from pastina.serve.frame import refuse
from pastina.serve.link import Text
from pastina.serve.refusals import Refusal, json_response
from pastina.serve.render import label_scores, render
from pastina.serve.schemas import (
    Answers,
    Input,
    MixedAnswers,
    MixedBody,
    PredictBody,
    TeiBody,
    TeiError,
)
from pastina.serve.server import Server

router = APIRouter(tags=["predict"])
PREDICT = "/v1/tasks/{task:path}/predict"
_LABELS: dict[str, Any] = {
    "type": "array",
    "items": {"$ref": "#/components/schemas/LabelScore"},
}
_TEI_ANSWERS = {"oneOf": [_LABELS, {"type": "array", "minItems": 1, "items": _LABELS}]}
Timeout = Annotated[
    float | None,
    Query(gt=0, le=3600, allow_inf_nan=False, description="Seconds to wait at most."),
]


@router.post(
    PREDICT,
    responses={200: {"model": Answers}, **errors(404, 408, 413, 504)},
    openapi_extra=body_of(PredictBody),
)
async def predict(request: Request, task: TASK, timeout: Timeout = None) -> Response:
    """Answer one text, one pair of texts, or a list of them."""
    server: Server = request.app.state.server
    caller = server.caller(request)
    settings = server.settings
    body = await parsed(request, PredictBody, settings.max_body, settings.read_s)
    server.check_ready()
    info = server.answering_task(caller, task)
    inputs = body.inputs if isinstance(body.inputs, list) else [body.inputs]
    texts = [_text(task, one) for one in inputs]
    server.check_sizes(texts)
    _check_pairs(texts, info["is_pair"])
    request.scope["texts"] = len(texts)
    found = await server.answers(request, caller, texts, timeout)
    answers = []
    for (_, text, _), answer in zip(texts, found, strict=True):
        if "refused" in answer:
            raise server.refusal(answer)
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
    server: Server = request.app.state.server
    caller = server.caller(request)
    settings = server.settings
    body = await parsed(request, MixedBody, settings.max_body, settings.read_s)
    server.check_ready()
    if len(body.items) > settings.max_texts:
        server.check_sizes([("", "", None)] * len(body.items))
    results: list[Any] = [None] * len(body.items)
    places, texts = [], list[Text]()
    for place, item in enumerate(body.items):
        text = _text(item.task, item.inputs)
        try:
            info = server.answering_task(caller, item.task)
            server.check_sizes([text])
            _check_pairs([text], info["is_pair"])
        except Refusal as refusal:
            results[place] = _item_error(server, refusal)
        else:
            places.append(place)
            texts.append(text)
    request.scope["texts"] = len(texts)
    found = await server.answers(request, caller, texts, timeout) if texts else []
    for place, text, answer in zip(places, texts, found, strict=True):
        item = body.items[place]
        if "refused" in answer:
            results[place] = _item_error(server, server.refusal(answer))
        else:
            results[place] = render(answer, text[1], item.top_k, item.threshold)
    return json_response({"answers": results})


@router.post(
    "/predict",
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
    try:
        return await _predict_tei(request)
    except Refusal as refusal:
        kind = {413: "Validation", 422: "Validation", 429: "Overloaded", 503: "Unhealthy"}
        response = await refuse(request, refusal)
        body = {"error": refusal.message, "error_type": kind.get(refusal.status, "Backend")}
        return json_response(body, response.status_code, refusal.headers)


async def _predict_tei(request: Request) -> Response:
    server: Server = request.app.state.server
    caller = server.caller(request)
    settings, name = server.settings, server.settings.default_task
    body = await parsed(request, TeiBody, settings.max_body, settings.read_s)
    if name is None:
        raise Refusal("unknown_task", "There is no default task. Start with --default-task NAME.")
    server.check_ready()
    info = server.answering_task(caller, name)
    if info["kind"] == "tag":
        raise Refusal("invalid", f"{name!r} finds spans; ask /v1/tasks/{name}/predict.")
    inputs = body.inputs
    is_batch = isinstance(inputs, list) and isinstance(inputs[0], list)
    rows: list[Any] = list(inputs) if is_batch else [inputs]
    texts = [_tei_text(name, [row] if isinstance(row, str) else row) for row in rows]
    server.check_sizes(texts)
    _check_pairs(texts, info["is_pair"])
    request.scope["texts"] = len(texts)
    found = await server.answers(request, caller, texts, None)
    for answer in found:
        if "refused" in answer:
            raise server.refusal(answer)
        if answer.get("truncated") and not body.truncate:
            raise Refusal("too_large", f"inputs must have at most {info['max_length']} tokens")
    answers = [label_scores(answer) for answer in found]
    return json_response(answers if is_batch else answers[0])


def _text(task: str, given: Input) -> Text:
    return (task, given, None) if isinstance(given, str) else (task, given.text, given.text_pair)


def _tei_text(task: str, texts: list[str]) -> Text:
    return (task, texts[0], texts[1] if len(texts) > 1 else None)


def _check_pairs(texts: list[Text], is_pair: bool) -> None:
    """Nothing, if all are pairs where the task reads pairs, and single texts where it does not."""
    for place, (name, _, pair) in enumerate(texts):
        if (pair is not None) != is_pair:
            wanted, seen = ("pairs", "one text") if is_pair else ("single texts", "a pair")
            raise Refusal("unreadable", f"{name!r} reads {wanted}, and inputs[{place}] is {seen}.")


def _item_error(server: Server, refusal: Refusal) -> dict[str, Any]:
    server.metrics.rejected.labels(refusal.code).inc()
    return {"error": {"code": refusal.code, "message": refusal.message, **refusal.extra}}

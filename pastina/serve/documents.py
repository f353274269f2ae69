"""Parts of the OpenAPI description that the routes cannot say in types."""

from typing import Annotated, Any

from fastapi import FastAPI, Path
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from pastina.serve.schemas import ErrorBody, MixedBody, PredictBody, TeiBody

MAX_NAME = 700  # characters of a task's name, or of what is taken for one
TASK = Annotated[
    str,
    Path(
        min_length=1,
        max_length=MAX_NAME,
        description="Name of a task; it may have slashes in it.",
        examples=["acme/intents"],
    ),
]
ARCHIVE: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "A zip or a tar (plain, gz, bz2, xz) of task.json, adapter_config.json, "
        "adapter_model.safetensors and, if you like, README.md, at the top or in one folder.",
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}
_SUMMARIES = {
    401: "No token that we know",
    403: "The token may not do that, or uploads are off",
    404: "No such task, or none for this token",
    408: "The body came too slowly",
    413: "Too much text, or too large a body",
    421: "Without tokens only this machine is answered",
    422: "Something in it cannot be used",
    429: "Too much is waiting, or too fast; see Retry-After",
    503: "Not ready, too many requests, or about to end; see Retry-After",
    504: "Not answered in time",
    507: "The folder cannot be written",
}
_COMMON = (401, 421, 422, 429, 503)


def errors(*more: int, kind: type[BaseModel] = ErrorBody) -> dict[int | str, dict[str, Any]]:
    """What a route may answer beside what was asked for; more: than what each of them may."""
    statuses = sorted((*_COMMON, *more))
    return {status: {"model": kind, "description": _SUMMARIES[status]} for status in statuses}


def body_of(kind: type[BaseModel]) -> dict[str, Any]:
    """A JSON body that the route reads itself."""
    schema: dict[str, Any] = {"$ref": f"#/components/schemas/{kind.__name__}"}
    examples = kind.model_config.get("json_schema_extra", {})
    content: dict[str, Any] = {"schema": schema}
    if isinstance(examples, dict) and isinstance(own := examples.get("examples"), list):
        content["examples"] = {f"{i}": {"value": one} for i, one in enumerate(own, 1)}
    return {"requestBody": {"required": True, "content": {"application/json": content}}}


def describe(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI description of the server."""
    if app.openapi_schema is None:
        found = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes
        )
        kinds = [(kind, "validation") for kind in (PredictBody, MixedBody, TeiBody)]
        _, own = models_json_schema(kinds, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
        parts = found["components"]
        parts["schemas"] |= own["$defs"]
        parts["schemas"].pop("HTTPValidationError", None)
        parts["schemas"].pop("ValidationError", None)
        parts["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        found["security"] = [{"token": []}, {}]
        app.openapi_schema = found
    return app.openapi_schema

"""The routes that tell of tasks, and those that change them."""

import asyncio
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response

from pastina.errors import AdapterError
from pastina.serve.access import Caller
from pastina.serve.archive import unpack
from pastina.serve.bodies import check_query, read_body
from pastina.serve.documents import ARCHIVE, TASK, errors
from pastina.serve.link import EngineGone
from pastina.serve.names import why_not_a_name
from pastina.serve.refusals import Refusal, json_response
from pastina.serve.schemas import Installed, TaskInfo, TaskList
from pastina.serve.server import Server

router = APIRouter(tags=["tasks"])
MOST_LISTED = 1000  # tasks at once: others wait while they are written down


@router.get("/v1/tasks", responses={200: {"model": TaskList}, **errors()})
async def list_tasks(
    request: Request,
    search: Annotated[str, Query(max_length=200, description="Part of a name.")] = "",
    kind: Annotated[Literal["classify", "multilabel", "regress", "tag"] | None, Query()] = None,
    refused: Annotated[bool | None, Query(description="Only refused ones, or only others.")] = None,
    answering: Annotated[
        bool | None,
        Query(
            description="Only such as answer (also while a newer version is refused), or others."
        ),
    ] = None,
    offset: Annotated[int, Query(ge=0, le=10**9)] = 0,
    limit: Annotated[int, Query(ge=1, le=MOST_LISTED)] = 100,
) -> Response:
    """List the tasks that this token may call, and the adapters that were refused."""
    check_query(request, "search", "kind", "refused", "answering", "offset", "limit")
    server: Server = request.app.state.server
    caller = server.caller(request)
    server.check_ready()
    server.take_from(caller, 1)
    needle = search.casefold()
    names = server.listing.names(caller.patterns)
    infos = [server.link.tasks[name] for name in names if needle in name.casefold()]
    if kind is not None:
        infos = [info for info in infos if info.get("kind") == kind]
    if refused is not None:
        infos = [info for info in infos if (info["refused"] is not None) == refused]
    if answering is not None:
        infos = [info for info in infos if ("digest" in info) == answering]
    some = [_told(info, with_labels=False) for info in infos[offset : offset + limit]]
    return json_response({"tasks": some, "total": len(infos)})


@router.get(
    "/v1/tasks/{task:path}",
    responses={200: {"model": TaskInfo}, **errors(404)},
)
async def show_task(request: Request, task: TASK) -> Response:
    """Tell of one task."""
    check_query(request)
    server: Server = request.app.state.server
    _check_route(task)
    caller = server.caller(request)
    server.check_ready()
    server.take_from(caller, 1)
    return json_response(_told(server.task(caller, task), with_labels=True))


@router.put(
    "/v1/tasks/{task:path}",
    responses={
        200: {"model": Installed, "description": "The task was replaced"},
        201: {"model": Installed, "description": "The task is new"},
        **errors(403, 404, 408, 413, 507),
    },
    openapi_extra=ARCHIVE,
)
async def put_task(request: Request, task: TASK) -> Response:
    """Upload an adapter as a zip or a tar. It answers from the next batch on."""
    check_query(request)
    server: Server = request.app.state.server
    caller = _admin(server, request, task)
    server.check_ready()
    server.take_from(caller, 1)
    if reason := why_not_a_name(task):
        raise Refusal("invalid", f"{task[:200]!r} cannot name a task: {reason}.")
    if server.uploading.locked():
        raise Refusal("queue_full", "Two uploads are under way.", headers={"Retry-After": "1"})
    limit = server.settings.max_upload
    async with server.uploading:
        content = await read_body(request, limit, 6 * server.settings.read_s)
        try:
            files = await asyncio.to_thread(unpack, content, limit)
        except AdapterError as error:
            raise Refusal("bad_adapter", str(error)) from None
        try:
            done = _done(await server.link.install(task, files))
        except EngineGone:
            raise _engine_gone() from None
    body = {"task": task, "digest": done["digest"], "replaced": not done["is_new"]}
    return json_response(body, 201 if done["is_new"] else 200)


@router.delete(
    "/v1/tasks/{task:path}",
    status_code=204,
    responses=errors(403, 404, 507),
)
async def delete_task(request: Request, task: TASK) -> Response:
    """Remove a task and its adapter."""
    check_query(request)
    server: Server = request.app.state.server
    caller = _admin(server, request, task)
    server.check_ready()
    server.take_from(caller, 1)
    server.task(caller, task)
    try:
        is_removed = _done(await server.link.remove(task))
    except EngineGone:
        raise _engine_gone() from None
    if not is_removed:
        raise Refusal("unknown_task", f"There is no task {task[:200]!r}.", near=[])
    return Response(status_code=204)


def _admin(server: Server, request: Request, task: str) -> Caller:
    """Who asks, if they may change this task.

    Raises:
        Refusal: they may not.
    """
    _check_route(task)
    caller = server.caller(request)
    if not server.settings.uploads:
        raise Refusal("forbidden", "Uploads are off. Start the server with --uploads.")
    if not caller.is_admin:
        raise Refusal("forbidden", "This token may not change tasks.")
    if not caller.may_call(task):
        raise Refusal("unknown_task", f"There is no task {task[:200]!r}.", near=[])
    return caller


def _check_route(task: str) -> None:
    """Nothing, if this names a task, and not the route that asks one.

    Raises:
        Refusal: that route takes POST only.
    """
    if task.endswith("/predict"):
        raise Refusal("wrong_method", "Method Not Allowed.", headers={"Allow": "POST"})


def _done(result: Mapping[str, Any]) -> Any:
    """What the registry did.

    Raises:
        Refusal: it refused, or could not.
    """
    if "refused" in result:
        raise Refusal("bad_adapter", result["refused"])
    if "failed" in result:
        raise Refusal("folder", result["failed"])
    return result["done"]


def _engine_gone() -> Refusal:
    return Refusal("not_ready", "The engine died meanwhile.", headers={"Retry-After": "1"})


def _told(info: Mapping[str, Any], *, with_labels: bool) -> dict[str, Any]:
    """What a client hears of a task."""
    labels = info.get("labels")
    told = {key: value for key, value in info.items() if key != "labels"}
    if labels is not None:
        told["num_labels"] = len(labels)
        if with_labels:
            told["labels"] = labels
    return told

"""The HTTP side put together: routes, errors, the page, and the engine's beginning and end."""

import base64
import hashlib
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Match

import pastina
from pastina.serve import predicting, tasks
from pastina.serve.bodies import check_query
from pastina.serve.direct import Direct
from pastina.serve.documents import describe, errors
from pastina.serve.frame import Frame, refuse
from pastina.serve.metrics import CONTENT_TYPE
from pastina.serve.refusals import Refusal, internal, json_response
from pastina.serve.server import Server

_ABOUT = """One frozen backbone, thousands of tasks. Every answer names the adapter that gave it by its
digest. Errors have the form {"error": {"code", "message", "request_id"}}."""


def make_app(server: Server) -> Any:
    """The ASGI application. It starts the engine when it starts, and ends it when it ends."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await server.link.start()
        yield
        await server.link.stop()

    app = FastAPI(
        title="pastina",
        version=pastina.__version__,
        description=_ABOUT,
        lifespan=lifespan,
        docs_url=None,  # their scripts come from elsewhere
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.server = server
    app.state.page = _page()
    app.router.routes.extend([*predicting.router.routes, *tasks.router.routes])
    app.add_api_route("/healthz", healthz, tags=["operation"])
    app.add_api_route("/readyz", readyz, tags=["operation"], responses=errors())
    app.add_api_route(
        "/metrics", metrics, tags=["operation"], responses=errors(403), name="metrics"
    )
    app.add_api_route("/", page, include_in_schema=False)
    app.add_exception_handler(Refusal, refuse)  # type: ignore[arg-type]
    app.add_exception_handler(RequestValidationError, _refuse_invalid)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, _refuse_route)  # type: ignore[arg-type]
    app.add_exception_handler(Exception, _refuse_bug)  # it is raised again, and the frame logs it
    app.openapi = lambda: describe(app)
    return Frame(Direct(app, app), server.metrics, server.settings.connections)


async def healthz(request: Request) -> Response:
    """Whether the server is there."""
    return json_response({"status": "ok"})


async def readyz(request: Request) -> Response:
    """Whether the server can answer: the backbone is loaded, the folder was looked at."""
    request.app.state.server.check_ready()
    return json_response({"status": "ready"})


async def metrics(request: Request) -> Response:
    """What was counted, for Prometheus."""
    check_query(request)
    server: Server = request.app.state.server
    if not server.caller(request).may_see_metrics:
        raise Refusal("forbidden", "This token may not see the metrics.")
    server.see_state()
    return Response(server.metrics.text(), media_type=CONTENT_TYPE)


async def page(request: Request) -> Response:
    """The page."""
    content, headers = request.app.state.page
    return Response(content, media_type="text/html; charset=utf-8", headers=headers)


def _page() -> tuple[bytes, dict[str, str]]:
    """The page, and headers that let it do only what it does."""
    text = files("pastina.serve").joinpath("page.html").read_text(encoding="utf-8")
    hashes = {}
    for tag in ("script", "style"):
        (inner,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()
        hashes[tag] = f"'sha256-{digest}'"
    policy = (
        f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    return text.encode(), {
        "Content-Security-Policy": policy,
        "Cache-Control": "no-cache",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }


async def _refuse_invalid(request: Request, error: RequestValidationError) -> Response:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return await refuse(request, Refusal("invalid", f"{where}: {first['msg']}."))


async def _refuse_bug(request: Request, error: Exception) -> Response:
    return await refuse(request, internal())


async def _refuse_route(request: Request, error: HTTPException) -> Response:
    code = {404: "unknown_route", 405: "wrong_method"}.get(error.status_code, "invalid")
    headers = dict(error.headers or {})
    if error.status_code == 405:
        headers["Allow"] = ", ".join(sorted(_methods(request)))
    refusal = Refusal(code, f"{error.detail}.", headers=headers)
    refusal.status = error.status_code
    return await refuse(request, refusal)


def _methods(request: Request) -> set[str]:
    """What the routes of this path take; of a path that several match, the first one counts."""
    found: dict[str, set[str]] = {}
    for route in request.app.routes:
        if route.matches(request.scope)[0] is not Match.NONE:
            found.setdefault(route.path, set()).update(route.methods)
    methods = next(iter(found.values()), set())
    return methods | {"HEAD"} if "GET" in methods else methods

"""The short way of the requests that are most: from the path straight to the function that answers.

FastAPI describes that route and takes all other requests. What it does to find its way costs more than
the rest of a request on this side; `predict` itself is the same in both ways.
"""

import re
from types import SimpleNamespace
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from pastina.serve.documents import MAX_NAME
from pastina.serve.frame import refuse
from pastina.serve.predicting import PREDICT, predict
from pastina.serve.refusals import Refusal

_PATH = re.compile(PREDICT.replace("{task:path}", f"(.{{1,{MAX_NAME}}})"))
_ROUTE: Any = SimpleNamespace(path_format=PREDICT.replace(":path", ""))  # its name in the metrics


class Direct:
    """ASGI middleware: a POST that asks one task, with nothing in the query, goes the short way."""

    def __init__(self, app: ASGIApp, fastapi: Any) -> None:
        self.app, self.fastapi = app, fastapi

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        found = None
        if scope["type"] == "http" and scope["method"] == "POST" and not scope["query_string"]:
            found = _PATH.fullmatch(scope["path"])
        if found is None:
            await self.app(scope, receive, send)
            return
        scope["app"], scope["route"] = self.fastapi, _ROUTE
        request = Request(scope, receive, send)
        try:
            response = await predict(request, found[1])
        except Refusal as refusal:
            response = await refuse(request, refusal)
        await response(scope, receive, send)

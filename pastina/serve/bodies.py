"""Bodies of requests: read up to a size and within a time, then checked."""

import asyncio
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from pastina.serve.refusals import Refusal

Body = TypeVar("Body", bound=BaseModel)
_PATIENCE = (
    4  # times the limit that is read and thrown away: then a client hears why it was refused
)


async def read_body(request: Request, max_bytes: int, seconds: float) -> bytes:
    """The whole body.

    Raises:
        Refusal: too large, too slow, or the client went away.
    """
    claimed = request.headers.get("content-length", "")
    if claimed.isdigit() and len(claimed) < 20 and int(claimed) > _PATIENCE * max_bytes:
        raise _too_large(max_bytes)
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(seconds):
            while True:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise Refusal("gone", "The client is gone.")
                part = message.get("body", b"")
                size += len(part)
                if size > _PATIENCE * max_bytes:
                    raise _too_large(max_bytes)
                if size <= max_bytes:
                    parts.append(part)
                if not message.get("more_body"):
                    break
    except TimeoutError:
        words = f"The body did not come within {seconds:g} s."
        raise Refusal("too_slow", words, headers={"Connection": "close"}) from None
    if size > max_bytes:
        raise _too_large(max_bytes)
    return b"".join(parts)


async def parsed(request: Request, kind: type[Body], max_bytes: int, seconds: float) -> Body:
    """The body as JSON of this kind.

    Raises:
        Refusal: as `read_body`, or it is something else.
    """
    content = await read_body(request, max_bytes, seconds)
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        problem = first["msg"] if first["type"] != "json_invalid" else "The body is not JSON"
        raise Refusal("invalid", f"{where}: {problem}." if where else f"{problem}.") from None


def _too_large(max_bytes: int) -> Refusal:
    words = f"The body has more than {max_bytes:,} bytes."
    return Refusal("too_large", words, headers={"Connection": "close"})

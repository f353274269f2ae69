"""Bodies of requests: read up to a size and within a time, then checked."""

import asyncio
import json
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from pastina.serve.refusals import Refusal
from pastina.serve.settings import MOST_TEXTS

Body = TypeVar("Body", bound=BaseModel)
_KINDS = ("str", "Pair")  # as pydantic calls what `inputs` may be
_OTHER_KIND = ("string_type", "model_type", "model_attributes_type", "list_type")
_NO_OBJECT = "Input should be an object"  # in other words than those for Python
_INPUTS = 'this is neither a text nor a pair {"text": ..., "text_pair": ...}'
_TOLD = 100  # mistakes in a body, above which none is looked at: each takes memory and time
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
        return _checked(kind, content)
    except ValidationError as error:
        if _is_too_long(error):
            words = f"More than {MOST_TEXTS:,} texts, which are more than any server takes at once."
            raise Refusal("too_large", words) from None
        raise Refusal("invalid", f"{problem_of(error)}.") from None


def _checked(kind: type[Body], content: bytes) -> Body:
    r"""JSON of this kind.

    Half of a character (`"\ud800"`) makes the parser refuse the whole body. It is the fault of one text,
    so Python's own parser has the second word, and the text is refused at its place.
    """
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        is_one = error.error_count() == 1
        if (
            not is_one
            or b"\\ud" not in content.lower()
            or error.errors()[0]["type"] != "json_invalid"
        ):
            raise
        try:
            values = json.loads(content.decode(), parse_constant=_no_number)
        except (ValueError, RecursionError):
            raise error from None
        return kind.model_validate(values)


def _is_too_long(error: ValidationError) -> bool:
    """Whether a list has more texts than any server takes."""
    if error.error_count() > _TOLD:
        return False
    return any(one.get("ctx", {}).get("max_length") == MOST_TEXTS for one in error.errors())


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is not JSON")


def check_query(request: Request, *known: str) -> None:
    """Nothing, if the query holds only these, each once.

    Raises:
        Refusal: it holds something that would be ignored.
    """
    if not request.scope["query_string"]:
        return
    others = f"is not one of {', '.join(known)}" if known else "means nothing here; leave it out"
    seen: set[str] = set()
    for name, _ in request.query_params.multi_items():
        if name not in known or name in seen:
            what = "is given twice" if name in known else others
            raise Refusal("invalid", f"query: {name[:100]!r} {what}.")
        seen.add(name)


def problem_of(error: ValidationError, root: str = "") -> str:
    """What is wrong, and where below `root`. Of a value that may be of several kinds, what the kind says
    that comes the furthest; what it may be at all, if it is none of them."""
    if error.error_count() > _TOLD:
        return f"{root or 'The body'} has {error.error_count():,} mistakes, too many to tell of"
    errors = error.errors(include_input=False, include_url=False, include_context=False)
    first = errors[0]
    if first["type"] == "json_invalid":
        return "The body is not JSON"
    field = first["loc"][:1]
    own = [one for one in errors if one["loc"][:1] == field]
    best = max(own, key=lambda one: (len(one["loc"]), one["type"] not in _OTHER_KIND))
    parts = [str(part) for part in best["loc"] if isinstance(part, int) or part.isidentifier()]
    where = ".".join(filter(None, [root, *(part for part in parts if part not in _KINDS)]))
    if len(own) > 1 and best["type"] in _OTHER_KIND:
        return f"{where}: {_INPUTS}"
    message = _NO_OBJECT if best["type"] == "model_type" else best["msg"]
    return f"{where}: {message}" if where else message


def _too_large(max_bytes: int) -> Refusal:
    words = f"The body has more than {max_bytes:,} bytes."
    return Refusal("too_large", words, headers={"Connection": "close"})

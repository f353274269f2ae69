"""What a client is told when it gets no answer: a status, a word for programs, a sentence for people."""

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

# code -> status
STATUS = {
    "invalid": 422,
    "unreadable": 422,
    "not_finite": 422,
    "bad_adapter": 422,
    "unauthorized": 401,
    "forbidden": 403,
    "unknown_host": 421,
    "unknown_task": 404,
    "unknown_route": 404,
    "wrong_method": 405,
    "too_slow": 408,
    "too_large": 413,
    "rate_limit": 429,
    "queue_full": 429,
    "gone": 499,
    "internal": 500,
    "engine": 500,
    "not_ready": 503,
    "busy": 503,
    "stopping": 503,
    "folder": 507,
    "deadline": 504,
}

_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
_TEI_KINDS = {413: "Validation", 422: "Validation", 429: "Overloaded", 503: "Unhealthy"}


class Refusal(Exception):
    """A request that is not answered. extra: further fields of the error's body."""

    def __init__(
        self, code: str, message: str, *, headers: Mapping[str, str] | None = None, **extra: Any
    ) -> None:
        super().__init__(message)
        self.code, self.message, self.extra = code, message, extra
        self.status = STATUS[code]
        self.headers = dict(headers or {})

    def body(self, request_id: str) -> dict[str, Any]:
        """The error as JSON has it."""
        about = {"code": self.code, "message": self.message, **self.extra}
        return {"error": about | {"request_id": request_id}}

    def tei_body(self) -> dict[str, str]:
        """The error as text-embeddings-inference says it."""
        return {"error": self.message, "error_type": _TEI_KINDS.get(self.status, "Backend")}


def internal() -> Refusal:
    """What a client is told of a mistake of ours."""
    return Refusal("internal", "This should not happen; the log says more.")


def json_response(
    body: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """JSON as bytes; numbers that JSON does not know are our mistake."""
    content = _ENCODER.encode(body).encode("utf-8", "backslashreplace")
    return Response(content, status, headers, media_type="application/json")

"""Logs as JSON, a line each. Texts are never in them: of errors only where they happened."""

import json
import logging
import sys
import threading
import traceback
from datetime import UTC, datetime
from typing import Any

_ENCODER = json.JSONEncoder(default=str)
_KNOWN = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName", "color_message"}


class JsonFormatter(logging.Formatter):
    """time, level, event, and whatever was given as `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        values: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        values |= {key: value for key, value in vars(record).items() if key not in _KNOWN}
        if record.exc_info and record.exc_info[0] is not None:
            values["error"] = record.exc_info[0].__name__
            # without the error's own words: they may hold a text
            frames = traceback.extract_tb(record.exc_info[2])
            values["where"] = [f"{f.filename}:{f.lineno} {f.name}" for f in frames]
        return _ENCODER.encode(values)


def configure_logs(level: str) -> None:
    """Let everything go to stderr as JSON; other libraries only from warnings on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.captureWarnings(True)
    for name in ("pastina", "uvicorn"):
        logging.getLogger(name).setLevel(level.upper())
    sys.excepthook = lambda kind, error, where: _tell(error)
    threading.excepthook = lambda about: _tell(about.exc_value)
    logging.getLogger("uvicorn.access").disabled = True


def _tell(error: BaseException | None) -> None:
    """The last word of a thread or of the process, a line like the others."""
    if error is not None and not isinstance(error, KeyboardInterrupt | SystemExit):
        logging.getLogger("pastina.serve").critical("a bug", exc_info=error)

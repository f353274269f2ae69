"""Logs as JSON, a line each. Texts are never in them: of errors only where they happened."""

import asyncio
import json
import logging
import sys
import threading
import time
import traceback
from functools import lru_cache
from typing import Any, TextIO

_ENCODER = json.JSONEncoder(default=str)
_KNOWN = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName", "color_message"}


class JsonFormatter(logging.Formatter):
    """time, level, event, and whatever was given as `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        values: dict[str, Any] = {
            "time": f"{_second(int(record.created))}.{int(record.msecs):03}+00:00",
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


@lru_cache(maxsize=4)
def _second(number: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(number))


class LineHandler(logging.Handler):
    """Writes lines to a stream. What is said within one turn of an event loop goes out at once; from
    errors on, and where no loop runs, each line for itself.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream
        self._lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record, or keep it until this turn of the loop is over."""
        try:
            line = self.format(record)
            is_first = not self._lines
            self._lines += (line, "\n")
            if record.levelno >= logging.ERROR or (loop := _running_loop()) is None:
                self.flush()
            elif is_first:
                loop.call_soon(self.flush)
        except Exception:
            self.handleError(record)

    def flush(self) -> None:
        """Write what was kept."""
        with self.lock:  # type: ignore[union-attr]
            lines, self._lines = self._lines, []
            try:
                self._stream.write("".join(lines))
                self._stream.flush()
            except (OSError, ValueError):  # nobody reads any more
                pass


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def configure_logs(level: str) -> None:
    """Let everything go to stderr as JSON; other libraries only from warnings on."""
    handler = LineHandler(sys.stderr)
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

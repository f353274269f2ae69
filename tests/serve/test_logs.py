"""The lines of the log: when they are written, and what they say."""

import asyncio
import io
import json
import logging
from collections.abc import Iterator

import pytest

from pastina.serve.logs import JsonFormatter, LineHandler


class Stream(io.StringIO):
    """Knows what each write to it was."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[str] = []

    def write(self, text: str) -> int:
        """Note it."""
        self.writes.append(text)
        return super().write(text)


@pytest.fixture
def stream() -> Stream:
    """What was written."""
    return Stream()


@pytest.fixture
def logger(stream: Stream) -> Iterator[logging.Logger]:
    """Writes to the stream."""
    handler = LineHandler(stream)
    handler.setFormatter(JsonFormatter())
    logger = logging.Logger("pastina.test")
    logger.addHandler(handler)
    yield logger
    handler.close()


def _events(text: str) -> list[str]:
    return [json.loads(line)["event"] for line in text.splitlines()]


def test_without_a_loop_each_line_is_written_at_once(
    logger: logging.Logger, stream: Stream
) -> None:
    logger.info("one", extra={"rows": 3})
    line = json.loads(stream.writes[0])
    assert line.pop("time")[10:].startswith("T")
    assert line == {"level": "info", "event": "one", "rows": 3}
    logger.info("two")
    assert [_events(text) for text in stream.writes] == [["one"], ["two"]]


def test_lines_of_one_turn_are_one_write(logger: logging.Logger, stream: Stream) -> None:
    async def say() -> None:
        logger.info("one")
        logger.warning("two")
        assert stream.writes == []
        await asyncio.sleep(0)
        logger.info("three")
        await asyncio.sleep(0)

    asyncio.run(say())
    assert [_events(text) for text in stream.writes] == [["one", "two"], ["three"]]


def test_errors_do_not_wait_and_keep_their_place(logger: logging.Logger, stream: Stream) -> None:
    async def say() -> None:
        logger.info("one")
        logger.error("two")
        assert _events(stream.getvalue()) == ["one", "two"]

    asyncio.run(say())
    assert _events(stream.getvalue()) == ["one", "two"]


def test_a_stream_that_nobody_reads_stops_nothing(logger: logging.Logger, stream: Stream) -> None:
    stream.close()
    logger.error("one")

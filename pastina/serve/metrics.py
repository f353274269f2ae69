"""What a server counts, in Prometheus' format."""

from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_OTHERS = "_others"


class Metrics:
    """The counters of one server. num_tasks: how many tasks are counted by name; the rest together."""

    def __init__(self, num_tasks: int) -> None:
        self.registry = own = CollectorRegistry()
        self.num_tasks = num_tasks
        self.queue = Histogram(
            "pastina_queue_seconds",
            "From a request's arrival to its first batch",
            buckets=_SECONDS,
            registry=own,
        )
        self.rows = Histogram(
            "pastina_batch_rows",
            "Texts, or windows of one, in a batch",
            buckets=_SIZES,
            registry=own,
        )
        tokens = tuple(32 * size for size in _SIZES)
        self.tokens = Histogram(
            "pastina_batch_tokens", "Tokens in a batch", buckets=tokens, registry=own
        )
        self.batch_tasks = Histogram(
            "pastina_batch_tasks", "Different tasks in a batch", buckets=_SIZES, registry=own
        )
        self.engine = Histogram(
            "pastina_engine_seconds", "A batch's time in the engine", buckets=_SECONDS, registry=own
        )
        self.requests = Counter(
            "pastina_requests", "Answered requests", ["route", "status"], registry=own
        )
        self.latency = Histogram(
            "pastina_request_seconds",
            "A prediction request's time in the server",
            buckets=_SECONDS,
            registry=own,
        )
        self.texts = Counter("pastina_task_texts", "Answered texts", ["task"], registry=own)
        self.rejected = Counter(
            "pastina_rejected", "Requests or texts that were not answered", ["reason"], registry=own
        )
        self.lost = Counter(
            "pastina_lost_connections",
            "Connections closed for want of room: idle ones, and new ones that found none",
            ["which"],
            registry=own,
        )
        self.waiting = Gauge(
            "pastina_waiting_texts", "Texts that wait or are worked on", registry=own
        )
        self.tasks = Gauge("pastina_tasks", "Tasks that answer", registry=own)
        self.refused = Gauge("pastina_tasks_refused", "Adapters that were refused", registry=own)
        self.ready = Gauge("pastina_ready", "Whether the engine is ready", registry=own)
        self.starts = Gauge(
            "pastina_engine_starts", "How often the engine was started", registry=own
        )
        self._per_task: dict[str, Any] = {}

    def see_batch(self, measures: Mapping[str, Any]) -> None:
        """Count a batch."""
        self.rows.observe(measures["rows"])
        self.tokens.observe(measures["tokens"])
        self.batch_tasks.observe(measures["tasks"])
        self.engine.observe(measures["seconds"])

    def see_answer(self, task: str, count: int = 1) -> None:
        """Count answered texts of a task; by its name, if it is among the first ones seen."""
        counter = self._per_task.get(task)
        if counter is None:
            is_full = len(self._per_task) >= self.num_tasks
            counter = self.texts.labels(_OTHERS if is_full else task)
            if not is_full:
                self._per_task[task] = counter
        counter.inc(count)

    def text(self) -> bytes:
        """All of it, as /metrics gives it."""
        return generate_latest(self.registry)

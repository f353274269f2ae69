"""Answers with the field names that people know from the pipelines of transformers."""

from collections.abc import Mapping
from typing import Any

_CHOSEN = 0.5  # of multilabel: what counts as said yes to


def render(
    answer: Mapping[str, Any], text: str, top_k: int | None, threshold: float | None
) -> dict[str, Any]:
    """The answer of the engine as `schemas.Answer` describes it.

    >>> answer = {"task": "t", "digest": "d", "kind": "classify", "label": "b", "score": 0.9}
    >>> render({**answer, "scores": {"a": 0.1, "b": 0.9}}, "x", 1, None)["scores"]
    [{'label': 'b', 'score': 0.9}]
    """
    kind = answer["kind"]
    found: dict[str, Any] = {"task": answer["task"], "digest": answer["digest"], "kind": kind}
    if kind == "regress":
        found["value"] = answer["value"]
    elif kind == "tag":
        found["entities"] = [
            _entity(span, text) for span in answer["spans"] if span["score"] >= (threshold or 0)
        ]
    else:
        best = ranked(answer["scores"])
        if kind == "classify":
            label, score = best[0]
            found["label"] = label if score >= (threshold or 0) else None
            found["score"] = score
        else:
            least = _CHOSEN if threshold is None else threshold
            found["labels"] = _listed([pair for pair in best if pair[1] >= least])
        found["scores"] = _listed([pair for pair in best[:top_k] if pair[1] >= (threshold or 0)])
    if answer.get("truncated"):
        found["truncated"] = True
    return found


def ranked(scores: Mapping[str, float]) -> list[tuple[str, float]]:
    """Labels and scores, the best first; equal ones in the order of the task's labels."""
    return sorted(scores.items(), key=lambda pair: -pair[1])


def label_scores(answer: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All labels with their scores, the best first; a number as the only label of its task."""
    if answer["kind"] == "regress":
        return _listed([("LABEL_0", answer["value"])])
    return _listed(ranked(answer["scores"]))


def _listed(pairs: list[tuple[str, float]]) -> list[dict[str, Any]]:
    return [{"label": label, "score": score} for label, score in pairs]


def _entity(span: Mapping[str, Any], text: str) -> dict[str, Any]:
    start, end = span["start"], span["end"]
    return {
        "entity_group": span["label"],
        "score": span["score"],
        "word": text[start:end],
        "start": start,
        "end": end,
    }

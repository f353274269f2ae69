"""Prediction speed: a [CLS] head on 150 classes against transformers' pipeline."""

from collections.abc import Callable
from typing import Any

from pastina.bench.peers import classify_with_pipeline
from pastina.bench.timing import in_turn, ratio, seconds
from pastina.bench.work import Measured, Work
from pastina.predict import load

_PRECISIONS = ("fp32", "bf16", "int8")


def measure_prediction(work: Work) -> Measured:
    """Texts/s over CLINC150's test file in each precision, over the pipeline's in fp32."""
    texts = list(work.test_texts)
    ours = {precision: load(work.adapter, precision=precision) for precision in _PRECISIONS}
    first = ours["fp32"]
    pipeline = classify_with_pipeline(work.files.folder, first.tokenizer, len(first.card.labels))

    def rate(answer: Callable[[list[str]], Any]) -> Callable[[int], float]:
        return lambda turn: len(texts) / seconds(lambda: answer(texts))

    contestants = {"pipeline": rate(pipeline)}
    contestants |= {precision: rate(task.predict) for precision, task in ours.items()}
    for answer in (pipeline, *(task.predict for task in ours.values())):
        answer(texts[:256])
    total = len(contestants) * work.size.repetitions
    raw = in_turn(contestants, work.size.repetitions, lambda: work.tick(total))
    figures, repetitions = {}, {}
    for precision in _PRECISIONS:
        key = f"predict_clinc150_{precision}"
        figures[key] = ratio(raw[precision], raw["pipeline"])
        repetitions[key] = {
            "unit": "texts/s",
            f"pastina_{precision}": raw[precision],
            "pipeline": raw["pipeline"],
        }
    return Measured(figures, repetitions)

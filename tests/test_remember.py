"""The linear probe's memory answers as the packed engine does and spares the backbone."""

from typing import Any

import pytest
import torch

from pastina.engine import RememberingEngine, make_engine
from pastina.engine.batching import Batch
from pastina.recipe import LinearOptions
from tests.test_engine import for_pooling, make_batch, make_model


def remembering(pooling: str) -> RememberingEngine:
    model = make_model("bert", pooling, LinearOptions())
    model.get_base_model().dropout.p = 0.0
    engine = make_engine(model, precision="fp32", remember=True)
    assert isinstance(engine, RememberingEngine)
    return engine


@pytest.mark.parametrize("pooling", ["cls", "mean", "tokens"])
def test_answers_as_the_packed_engine(pooling: str) -> None:
    engine = remembering(pooling)
    batch = for_pooling(make_batch("bert"), pooling)
    wanted = engine.inner.logits(batch)
    for _ in range(2):
        torch.testing.assert_close(engine.logits(batch), wanted, atol=1e-6, rtol=1e-6)


def test_rows_in_other_company_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = remembering("mean")
    batch = for_pooling(make_batch("bert"), "mean")
    wanted = engine.logits(batch)
    monkeypatch.setattr(engine.inner, "states", lambda batch: pytest.fail("the backbone ran again"))
    order = torch.tensor([4, 0, 2])
    fewer = Batch({n: t[order] for n, t in batch.inputs.items()}, None, None, 3)
    torch.testing.assert_close(engine.logits(fewer), wanted[order])


def test_other_words_of_a_text_are_other_rows() -> None:
    engine = remembering("tokens")
    batch = make_batch("bert")
    assert batch.items is not None
    engine.logits(batch)
    rows, tokens = batch.items
    last = Batch(batch.inputs, (rows, tokens.flip(0) * 0 + 1), None, batch.num_items)
    torch.testing.assert_close(engine.logits(last), engine.inner.logits(last))


def test_full_memory_still_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pastina.engine.remember._BUDGET", 200)
    engine = remembering("cls")
    batch = for_pooling(make_batch("bert"), "cls")
    wanted = engine.inner.logits(batch)
    for _ in range(2):
        torch.testing.assert_close(engine.logits(batch), wanted)
    assert engine.num_bytes <= 200


def test_the_head_learns() -> None:
    engine = remembering("mean")
    batch = for_pooling(make_batch("bert"), "mean")
    for _ in range(2):
        engine.inner.reference.model.zero_grad()
        engine.logits(batch).sum().backward()
        head: Any = engine.inner.task_model.classifier
        head = head.modules_to_save["default"]
        assert head.weight.grad is not None
        assert head.weight.grad.abs().sum() > 0

"""What lies below the lowest trained layer is worked out once, and answers and learns as before."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import pastina
from pastina.data.encode import Example
from pastina.engine import RememberingEngine, make_engine
from pastina.engine.batching import Batch, collate
from pastina.engine.packed import PackedEngine
from pastina.recipe import LinearOptions, PastaOptions, Recipe
from pastina.training.loop import Loop
from tests.test_engine import make_batch, make_model

Toy = Callable[..., Recipe]
METHODS = {"linear": LinearOptions(), "upper layer": PastaOptions(layers=(1,), dropout=0.0)}


def examples(pooling: str) -> list[Example]:
    """The rows of make_batch as examples."""
    batch = make_batch("bert")
    ids_BT, mask_BT = batch.inputs["input_ids"], batch.inputs["attention_mask"]
    types_BT = batch.inputs["token_type_ids"]
    found = []
    for row, length in enumerate(mask_BT.sum(1).tolist()):
        words = list(range(1, length - 1)) if pooling == "tokens" else None
        ids, types = ids_BT[row, :length].tolist(), types_BT[row, :length].tolist()
        found.append(Example(row, ids, types, None, words, words, False))
    return found


def batch_of(chosen: list[Example]) -> Batch:
    return collate(chosen, 0, with_targets=False)


def remembering(pooling: str, method: str, folder: Path) -> RememberingEngine:
    model = make_model("bert", pooling, METHODS[method])
    model.get_base_model().dropout.p = 0.0
    engine = make_engine(model, precision="fp32", remember=True)
    assert isinstance(engine, RememberingEngine)
    engine.remember(examples(pooling), 0, "cpu", folder / "states" / "file.bin")
    return engine


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pooling", ["cls", "mean", "tokens"])
def test_answers_as_the_packed_engine(
    pooling: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = remembering(pooling, method, tmp_path)
    rows = examples(pooling)
    for chosen in (rows, rows[::-1], rows[1:2], [rows[2], rows[0]]):
        batch = batch_of(chosen)
        wanted = engine.inner.logits(batch)
        with monkeypatch.context() as patch:
            patch.setattr(engine.inner.encoder, "embed", lambda *a: pytest.fail("it ran again"))
            found = engine.logits(batch)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_other_words_and_unknown_rows_are_worked_out_anew(method: str, tmp_path: Path) -> None:
    engine = remembering("tokens", method, tmp_path)
    (row,) = examples("tokens")[:1]
    other = Example(0, row.input_ids, row.token_type_ids, None, [1], [0], False)
    torch.testing.assert_close(
        engine.logits(batch_of([other])), engine.inner.logits(batch_of([other]))
    )
    ids = [row.input_ids[0], 9, 9, row.input_ids[-1]]
    new = Example(0, ids, [0] * 4, None, [1, 2], [0, 1], False)
    both = batch_of([row, new])
    torch.testing.assert_close(engine.logits(both), engine.inner.logits(both))


@pytest.mark.parametrize("method", METHODS)
def test_large_memories_lie_in_a_file(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pastina.engine.remember.IN_MEMORY", 100)
    engine = remembering("mean", method, tmp_path)
    batch = batch_of(examples("mean"))
    torch.testing.assert_close(engine.logits(batch), engine.inner.logits(batch))
    assert list((tmp_path / "states").iterdir()) == [], "the file goes with the process"


def test_all_memories_share_one_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = remembering("mean", "linear", tmp_path)
    assert first.memory is not None
    monkeypatch.setattr("pastina.engine.remember.IN_MEMORY", first.memory.num_bytes * 3 // 2)
    second = remembering("mean", "linear", tmp_path)
    assert (tmp_path / "states").is_dir(), "the second lies in a file"
    shutil.rmtree(tmp_path / "states")
    del first
    third = remembering("mean", "linear", tmp_path)
    assert not (tmp_path / "states").exists(), "what the first took is free again"
    batch = batch_of(examples("mean"))
    torch.testing.assert_close(second.logits(batch), third.logits(batch))


def test_gradients(tmp_path: Path) -> None:
    engine = remembering("mean", "upper layer", tmp_path)
    model, batch = engine.inner.reference.model, batch_of(examples("mean"))
    grads: list[dict[str, torch.Tensor]] = []
    for one in (engine, engine.inner):
        model.zero_grad()
        one.logits(batch).square().sum().backward()
        named = model.named_parameters()
        grads.append({n: p.grad.clone() for n, p in named if p.grad is not None})
    assert len(grads[0]) == 3
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], atol=1e-5, rtol=1e-5, msg=name)


def test_vectors_in_every_layer_leave_nothing_to_remember() -> None:
    model = make_model("bert", "cls", PastaOptions())
    assert isinstance(make_engine(model, precision="fp32", remember=True), PackedEngine)


def test_a_run_on_upper_layers(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends as without the memory, and each text goes through the lower layer once."""
    fit = {"precision": "fp32", "epochs": 3}
    recipe = toy(method={"name": "pasta", "layers": [1]}, fit=fit)
    counts: list[int] = []
    inner: Any = PackedEngine.lower_states

    def counted(engine: PackedEngine, batch: Batch, stop: int) -> Any:
        counts.append(len(batch.inputs["input_ids"]))
        return inner(engine, batch, stop)

    monkeypatch.setattr(PackedEngine, "lower_states", counted)
    run = pastina.train(recipe, tmp_path / "with")
    assert sum(counts) == 40 + 20
    monkeypatch.setattr(Loop, "remember", lambda *a: None)
    plain = pastina.train(recipe, tmp_path / "without")
    found, wanted = (load_file(r.adapter / "adapter_model.safetensors") for r in (run, plain))
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-5, msg=name)

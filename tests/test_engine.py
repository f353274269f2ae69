"""The packed engine answers and learns as the reference does, and steps aside where it cannot.

Shape letters: B rows, T tokens, N items, C outputs.
"""

import logging
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import ModernBertConfig

from pastina.engine import ReferenceEngine, flash, make_engine, native
from pastina.engine.batching import Batch
from pastina.engine.chunks import make_chunks
from pastina.engine.encoder import Encoder
from pastina.engine.packed import PackedEngine
from pastina.engine.packing import pack
from pastina.heads import TaskModel
from pastina.methods import attach, train_mode
from pastina.recipe import FullOptions, LinearOptions, PastaOptions
from tests.models import CONFIGS, PAD, SPECIAL, batch, build

CPU = torch.device("cpu")
MIXED = (9, 4, 23, 9, 3, 14)
FAMILIES = ("bert", "roberta", "electra", "distilbert", "modernbert")
LAYOUTS = ("bert", "modernbert")  # norm after each part, norm before it
POOLINGS = ("cls", "mean", "tokens")
OUTPUTS = 5


def make_batch(name: str, lengths: tuple[int, ...] = MIXED, *, pair: bool = True) -> Batch:
    """Rows of these lengths, every second one a pair; each word of a row is asked for."""
    generator = torch.Generator().manual_seed(3)
    first, *_, last = SPECIAL[name]
    ids_BT = torch.randint(4, 100, (len(lengths), max(lengths)), generator=generator)
    mask_BT = torch.zeros_like(ids_BT)
    types_BT = torch.zeros_like(ids_BT)
    rows, tokens = [], []
    for row, length in enumerate(lengths):
        ids_BT[row, 0], ids_BT[row, length - 1], ids_BT[row, length:] = first, last, PAD[name]
        mask_BT[row, :length] = 1
        if pair and row % 2 and length > 4:
            ids_BT[row, length // 2], types_BT[row, length // 2 + 1 :] = last, 1
        rows += [row] * (length - 2)
        tokens += list(range(1, length - 1))
    inputs = {"input_ids": ids_BT, "attention_mask": mask_BT}
    if name in ("bert", "electra"):
        inputs["token_type_ids"] = types_BT * mask_BT
    return Batch(inputs, (torch.tensor(rows), torch.tensor(tokens)), None, len(rows))


def for_pooling(batch: Batch, pooling: str) -> Batch:
    if pooling == "tokens":
        return batch
    return Batch(batch.inputs, None, None, len(batch.inputs["input_ids"]))


def make_backbone(name: str) -> Any:
    """As `build`, and no bias or weight of a norm is what it was made with."""
    backbone = build(name)
    torch.manual_seed(11)
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return backbone


def make_model(name: str = "bert", pooling: str = "cls", options: Any = None) -> Any:
    task_model = TaskModel(make_backbone(name), OUTPUTS, pooling=pooling)
    torch.manual_seed(5)
    model = attach(
        task_model,
        options or PastaOptions(init_std=0.5, dropout=0.2),
        special_token_ids=SPECIAL[name],
        num_slots=3,
        modules_to_save=["classifier"],
        task_type="TOKEN_CLS" if pooling == "tokens" else "SEQ_CLS",
    )
    head: Any = task_model.classifier
    torch.nn.init.normal_(head.modules_to_save["default"].bias)
    train_mode(model)
    return model


def learn(engine: Any, batch: Batch, seed: int = 7) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and gradients of what learns, in train mode."""
    engine_model = engine.reference.model if isinstance(engine, PackedEngine) else engine.model
    engine_model.zero_grad()
    torch.manual_seed(seed)
    logits_NC = engine.logits(batch)
    torch.nn.functional.cross_entropy(logits_NC, torch.arange(len(logits_NC)) % OUTPUTS).backward()
    named = engine_model.named_parameters()
    return logits_NC.detach(), {n: p.grad.clone() for n, p in named if p.grad is not None}


def check_equal(model: Any, batch: Batch, *, num_grads: int) -> None:
    packed = make_engine(model, precision="fp32")
    assert packed.name == "packed"
    logits, grads = learn(packed, batch)
    wanted, wanted_grads = learn(ReferenceEngine(model), batch)
    torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-5)
    assert grads.keys() == wanted_grads.keys()
    assert len(grads) == num_grads
    for name, grad in grads.items():
        torch.testing.assert_close(grad, wanted_grads[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.fixture
def _in_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the kernels of this processor, as on others."""
    monkeypatch.setattr("pastina.engine.families.can_fuse", lambda *about: False)


# ---------------------------------------------------------------------------------------------------
# Equal to the reference


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("name", FAMILIES)
def test_trains_as_the_reference(name: str, pooling: str) -> None:
    options = PastaOptions(init_std=0.5, dropout=0.2 if pooling != "tokens" else 0.0)
    model = make_model(name, pooling, options)
    if pooling == "tokens":  # the head's own draws differ, see the module
        model.get_base_model().dropout.p = 0.0
    batch = for_pooling(make_batch(name), pooling)
    check_equal(model, batch, num_grads=CONFIGS[name].num_hidden_layers + 2)


@pytest.mark.usefixtures("_in_pytorch")
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("name", ["bert", "distilbert"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_without_kernels(name: str, pooling: str, precision: Any) -> None:
    model = make_model(name, pooling, PastaOptions(init_std=0.5, dropout=0.0))
    model.get_base_model().dropout.p = 0.0
    batch = for_pooling(make_batch(name), pooling)
    if precision == "fp32":
        check_equal(model, batch, num_grads=5)
    else:
        check_near(model, batch, precision)


@pytest.mark.parametrize("name", ["bert", "roberta", "xlm-roberta"])
def test_frozen_pooler(name: str) -> None:
    check_equal(make_model(name, "pooler"), for_pooling(make_batch(name), "pooler"), num_grads=5)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize(
    "lengths", [(7,), (8, 8, 8), (5,), (3, 3), (30, 4), (12, 12, 11, 11, 11, 5, 5)], ids=str
)
@pytest.mark.parametrize("name", LAYOUTS)
def test_lengths(name: str, lengths: tuple[int, ...], pooling: str) -> None:
    model = make_model(name, pooling)
    model.get_base_model().dropout.p = 0.0
    check_equal(model, for_pooling(make_batch(name, lengths), pooling), num_grads=5)


@pytest.mark.usefixtures("_in_pytorch")
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("scratch", [0, 1000], ids=["one row each", "some rows"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_several_chunks(
    name: str, scratch: int, pooling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pastina.engine.chunks._SCRATCH", scratch)
    model = make_model(name, pooling)
    model.get_base_model().dropout.p = 0.0
    check_equal(model, for_pooling(make_batch(name), pooling), num_grads=5)


@pytest.mark.usefixtures("_in_pytorch")
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_long_rows_redo_their_attention(
    name: str, pooling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pastina.engine.attention._KEEP_SCORES", 10)
    model = make_model(name, pooling)
    model.get_base_model().dropout.p = 0.0
    check_equal(model, for_pooling(make_batch(name), pooling), num_grads=5)


@pytest.mark.usefixtures("_in_pytorch")
@pytest.mark.parametrize("lengths", [MIXED, (9,), (12, 12, 12), (23, 22, 21)], ids=str)
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("name", FAMILIES)
def test_attention_that_writes_no_scores(
    name: str, pooling: str, lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way of long rows, on short ones: with padding in a chunk, and without."""
    calls: list[bool] = []
    inner = flash.back
    monkeypatch.setattr(flash, "_LONG", 2)
    monkeypatch.setattr(flash, "back", lambda *a: (calls.append(True), inner(*a))[1])
    monkeypatch.setattr("pastina.engine.chunks._FREE_WASTE", 1 << 10)
    batch = for_pooling(make_batch(name, lengths), pooling)
    model = make_model(name, pooling, PastaOptions(init_std=0.5, dropout=0.0))
    model.get_base_model().dropout.p = 0.0
    check_equal(model, batch, num_grads=CONFIGS[name].num_hidden_layers + 2)
    assert calls


@pytest.mark.usefixtures("_in_pytorch")
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("keep", [10, 100])
@pytest.mark.parametrize("name", LAYOUTS)
def test_long_rows_go_in_steps(
    name: str, keep: int, pooling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pastina.engine.attention._KEEP_SCORES", keep)
    for constant, value in {"_NEAR_STEP": 4, "_LONG": 8, "_LONG_STEP": 5}.items():
        monkeypatch.setattr(f"pastina.engine.sight.{constant}", value)
    model = make_model(name, pooling)
    model.get_base_model().dropout.p = 0.0
    batch = for_pooling(make_batch(name), pooling)
    check_equal(model, batch, num_grads=5)


@pytest.mark.parametrize("share", ["none", "by_token", "all"])
def test_shared_vectors(share: Any) -> None:
    options = PastaOptions(init_std=0.5, dropout=0.2, share=share)
    check_equal(make_model(options=options), for_pooling(make_batch("bert"), "cls"), num_grads=5)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("layers", [(0,), (2,), (1, 2), (0, 2)], ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_some_layers(name: str, layers: tuple[int, ...], pooling: str) -> None:
    model = make_model(name, pooling, PastaOptions(init_std=0.5, dropout=0.0, layers=layers))
    model.get_base_model().dropout.p = 0.0
    batch = for_pooling(make_batch(name), pooling)
    check_equal(model, batch, num_grads=2 + len(layers))


def test_some_vectors_frozen() -> None:
    model = make_model()
    for name, parameter in model.named_parameters():
        if "layer.0.pasta_vectors" in name or "layer.2.pasta_vectors" in name:
            parameter.requires_grad = False
    check_equal(model, for_pooling(make_batch("bert"), "cls"), num_grads=3)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("name", ["roberta", "modernbert"])
def test_linear_method(name: str, pooling: str) -> None:
    model = make_model(name, pooling, LinearOptions())
    model.get_base_model().dropout.p = 0.0
    check_equal(model, for_pooling(make_batch(name), pooling), num_grads=2)


@pytest.mark.parametrize("activation", ["relu", "gelu_new", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_activations(name: str, activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    key = "hidden_act" if name == "bert" else "hidden_activation"
    monkeypatch.setattr(CONFIGS[name], key, activation)
    check_equal(make_model(name), for_pooling(make_batch(name), "cls"), num_grads=5)


@pytest.mark.usefixtures("_in_pytorch")
@pytest.mark.parametrize("name", LAYOUTS)
def test_without_onednn(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pastina.engine.affine._onednn", None)
    check_equal(make_model(name), for_pooling(make_batch(name), "cls"), num_grads=5)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize(
    "changes",
    [
        {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        {"layer_types": ["sliding_attention"] * 3, "local_attention": 9},
        {"layer_types": ["full_attention"] * 3},
        {"attention_bias": True, "mlp_bias": True, "norm_bias": True},
    ],
    ids=str,
)
def test_kinds_of_modernbert(changes: Any, pooling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = CONFIGS["modernbert"].to_dict()
    monkeypatch.setitem(CONFIGS, "modernbert", ModernBertConfig(**{**plain, **changes}))
    model = make_model("modernbert", pooling)
    model.get_base_model().dropout.p = 0.0
    check_equal(model, for_pooling(make_batch("modernbert"), pooling), num_grads=5)


def with_rope(monkeypatch: pytest.MonkeyPatch, rope: Any) -> None:
    """Global layers with these rotary positions."""
    plain = CONFIGS["modernbert"].to_dict()
    plain["rope_parameters"]["full_attention"] = {"rope_theta": 1e3, "factor": 3.0, **rope}
    monkeypatch.setitem(CONFIGS, "modernbert", ModernBertConfig(**plain))


@pytest.mark.parametrize(
    "rope",
    [{"rope_type": "linear"}, {"rope_type": "yarn", "original_max_position_embeddings": 20}],
    ids=["linear", "yarn"],
)
def test_stretched_positions(rope: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with_rope(monkeypatch, rope)
    batch = for_pooling(make_batch("modernbert"), "mean")
    check_equal(make_model("modernbert", "mean"), batch, num_grads=5)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert"])
@pytest.mark.skipif(native.kernels() is None, reason="the kernels do not run here")
def test_embeddings_are_the_backbones(name: str, side: str) -> None:
    """In the kernels as in the backbone itself, whatever is padded; unknown tokens are told."""
    backbone = make_backbone(name)
    inputs, encoder = batch(name, side), Encoder(backbone)
    packed = encoder.pack(inputs["attention_mask"].bool())
    known = encoder.embeddings(CPU)
    assert known is not None
    found = encoder.embed(inputs, packed)
    narrow = {key: value.int() for key, value in inputs.items()}
    assert torch.equal(found, encoder.embed(narrow, packed))
    encoder._embeddings = None
    torch.testing.assert_close(found, encoder.embed(inputs, packed), atol=2e-6, rtol=1e-5)
    one, two = torch.tensor([known.num_tokens]), torch.tensor([2])
    with pytest.raises(IndexError, match=f"to {known.num_tokens}, but the backbone"):
        known.embed(one, two, None)
    for place in (-1, known.num_places):
        with pytest.raises(IndexError, match=r"Positions .* Lower max_length"):
            known.embed(two, torch.tensor([place]), None)
    assert known.embed(one[:0], one[:0], None).shape == (0, known.hidden_size)


@pytest.mark.skipif(native.kernels() is None, reason="the kernels do not run here")
def test_embeddings_outlive_what_the_backbone_does_with_its_own() -> None:
    """Their numbers are read by address, and stay where they are when the model gets others."""
    backbone, inputs = make_backbone("bert"), batch("bert")
    encoder = Encoder(backbone)
    packed = encoder.pack(inputs["attention_mask"].bool())
    known = encoder.embeddings(CPU)
    assert known is not None
    addresses = [known.told.word, known.told.position, known.told.type]
    addresses += [known.told.norm_weight, known.told.norm_bias]
    found = encoder.embed(inputs, packed)
    backbone.half().float()
    held = {tensor.data_ptr() for tensor in known.kept}
    assert held == set(addresses)
    assert not held & {parameter.data_ptr() for parameter in backbone.embeddings.parameters()}
    assert torch.equal(found, encoder.embed(inputs, packed))


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("precision", ["bf16", "int8"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_other_precisions_are_near(name: str, precision: Any, pooling: str) -> None:
    model, batch = make_model(name, pooling), for_pooling(make_batch(name), pooling)
    model.get_base_model().dropout.p = 0.0
    check_near(model, batch, precision)


def check_near(model: Any, batch: Batch, precision: Any) -> None:
    logits, grads = learn(PackedEngine(model, precision), batch)
    wanted, wanted_grads = learn(PackedEngine(model), batch)
    assert 0 < (logits - wanted).norm() < 0.05 * wanted.norm()
    for key, grad in grads.items():
        if "pasta_vectors" in key:
            near = torch.cosine_similarity(grad.flatten(), wanted_grads[key].flatten(), 0)
            assert near > 0.98, key


@pytest.mark.parametrize("pooling", [*POOLINGS, "pooler"])
def test_answers_in_eval(pooling: str) -> None:
    model = make_model("bert", pooling).eval()
    batch = for_pooling(make_batch("bert"), pooling)
    with torch.inference_mode():
        found, wanted = (
            e.logits(batch) for e in (make_engine(model, precision="fp32"), ReferenceEngine(model))
        )
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", LAYOUTS)
def test_answers_first_then_trains(name: str) -> None:
    model, batch = make_model(name), for_pooling(make_batch(name), "cls")
    engine = make_engine(model, precision="fp32")
    with torch.inference_mode():
        engine.logits(batch)
    learn(engine, batch)


def test_every_token_steps_aside() -> None:
    model = make_model("bert", "tokens").eval()
    batch = Batch(make_batch("bert", (6, 6)).inputs, None, None, 2)
    found, wanted = (
        e.logits(batch) for e in (make_engine(model, precision="fp32"), ReferenceEngine(model))
    )
    assert torch.equal(found, wanted)


def test_no_words() -> None:
    model = make_model("bert", "tokens")
    none = torch.tensor([], dtype=torch.long)
    logits = make_engine(model, precision="fp32").logits(
        Batch(make_batch("bert").inputs, (none, none), None, 0)
    )
    assert logits.shape == (0, OUTPUTS)
    logits.sum().backward()


def test_modernbert_knows_no_types() -> None:
    batch = for_pooling(make_batch("modernbert"), "mean")
    batch.inputs["token_type_ids"] = torch.ones_like(batch.inputs["input_ids"])
    check_equal(make_model("modernbert", "mean"), batch, num_grads=5)


@pytest.mark.parametrize("dropped", ["attention_mask", "token_type_ids"])
def test_fewer_inputs(dropped: str) -> None:
    batch = for_pooling(make_batch("bert", (8, 8)), "mean")
    del batch.inputs[dropped]
    check_equal(make_model("bert", "mean"), batch, num_grads=5)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("name", ["bert", "roberta", "modernbert"])
def test_left_padding(name: str, pooling: str) -> None:
    batch = for_pooling(make_batch(name), pooling)
    flipped = {key: tensor.flip(1) for key, tensor in batch.inputs.items()}
    items = None if batch.items is None else (batch.items[0], max(MIXED) - 1 - batch.items[1])
    model = make_model(name, pooling)
    model.get_base_model().dropout.p = 0.0
    check_equal(model, Batch(flipped, items, None, batch.num_items), num_grads=5)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_mask_with_holes(name: str, pooling: str) -> None:
    batch = for_pooling(make_batch(name), pooling)
    batch.inputs["attention_mask"][:, 2] = 0
    batch.inputs["attention_mask"][2, 5:9] = 0
    check_equal(make_model(name, pooling), batch, num_grads=5)


def test_holes_move_tokens_out_of_sight() -> None:
    batch = for_pooling(make_batch("modernbert", (5, 4)), "mean")  # the window reaches three tokens
    batch.inputs["attention_mask"][:, 2] = 0
    check_equal(make_model("modernbert", "mean"), batch, num_grads=5)


def test_disabled_adapter_is_the_backbone() -> None:
    model, batch = make_model(), for_pooling(make_batch("bert"), "cls")
    engine = make_engine(model.eval(), precision="fp32")
    tuned = engine.logits(batch)
    with model.disable_adapter():
        torch.testing.assert_close(engine.logits(batch), ReferenceEngine(model).logits(batch))
        assert not torch.allclose(engine.logits(batch), tuned, atol=1e-3)
    assert torch.equal(engine.logits(batch), tuned)


def test_reads_vectors_and_head_live() -> None:
    model, batch = make_model(), for_pooling(make_batch("bert"), "cls")
    engine = make_engine(model, precision="fp32")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    before, _ = learn(engine, batch)
    optimizer.step()
    assert not torch.allclose(learn(engine, batch)[0], before, atol=1e-3)
    check_equal(model, batch, num_grads=5)


# ---------------------------------------------------------------------------------------------------
# Laws


@pytest.mark.parametrize("pooling", POOLINGS)
def test_same_bits_again(pooling: str) -> None:
    batch = for_pooling(make_batch("bert"), pooling)
    (first, first_grads), (second, second_grads) = (
        learn(make_engine(make_model("bert", pooling), precision="fp32"), batch) for _ in range(2)
    )
    assert torch.equal(first, second)
    assert all(torch.equal(first_grads[name], second_grads[name]) for name in first_grads)


def test_no_gradient_on_frozen_weights() -> None:
    model = make_model("bert", "mean")
    _, grads = learn(make_engine(model, precision="fp32"), for_pooling(make_batch("bert"), "mean"))
    assert all("pasta_vectors" in name or "classifier" in name for name in grads)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_rows_do_not_see_each_other(name: str, pooling: str) -> None:
    model = make_model(name, pooling).eval()
    engine, batch = make_engine(model, precision="fp32"), for_pooling(make_batch(name), pooling)
    together = engine.logits(batch)
    for row, length in enumerate(MIXED):
        alone = {name: tensor[row : row + 1, :length] for name, tensor in batch.inputs.items()}
        logits = engine.logits(Batch(alone, None, None, 1))
        torch.testing.assert_close(logits, together[row : row + 1], atol=1e-6, rtol=1e-6)


def test_nothing_is_kept_for_an_answer() -> None:
    model, batch = make_model(), for_pooling(make_batch("bert"), "cls")
    with torch.no_grad():
        assert not make_engine(model, precision="fp32").logits(batch).requires_grad


def test_backward_twice_is_an_error() -> None:
    logits = make_engine(make_model(), precision="fp32").logits(
        for_pooling(make_batch("bert"), "cls")
    )
    logits.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward once"):
        logits.sum().backward()


def test_pack_keeps_every_token_once() -> None:
    mask_BT = make_batch("bert").inputs["attention_mask"].bool()
    packed = pack(mask_BT, num_heads=2)
    assert packed.length_B.tolist() == sorted(MIXED, reverse=True)
    assert torch.equal(packed.token_P.sort().values, mask_BT.flatten().nonzero()[:, 0])
    assert torch.equal(packed.place_BT[packed.token_P], torch.arange(sum(MIXED)))


def test_chunks_hold_rows_of_like_length() -> None:
    lengths = sorted(torch.randint(3, 400, (300,), generator=torch.Generator()).tolist())[::-1]
    chunks = make_chunks(lengths, 12, CPU)
    assert [row for c in chunks for row in range(300)[c.rows]] == list(range(300))
    assert [t for c in chunks for t in range(sum(lengths))[c.tokens]] == list(range(sum(lengths)))
    padded = sum((c.rows.stop - c.rows.start) * c.length for c in chunks)
    assert padded < 1.1 * sum(lengths)


# ---------------------------------------------------------------------------------------------------
# Steps aside


def _reason(model: Any, caplog: pytest.LogCaptureFixture) -> str:
    with caplog.at_level(logging.INFO, logger="pastina"):
        assert make_engine(model, precision="fp32").name == "reference"
    (record,) = caplog.records
    return record.getMessage()


def test_unknown_backbone(caplog: pytest.LogCaptureFixture) -> None:
    assert "MPNetModel" in _reason(make_model("mpnet"), caplog)


def test_positions_that_change_with_the_batch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with_rope(monkeypatch, {"rope_type": "dynamic"})
    assert "'dynamic'" in _reason(make_model("modernbert"), caplog)


def test_full_fine_tuning(caplog: pytest.LogCaptureFixture) -> None:
    model = attach(TaskModel(build("bert"), OUTPUTS, pooling="cls"), FullOptions())
    assert "FULL" in _reason(model, caplog)


def test_other_methods(caplog: pytest.LogCaptureFixture) -> None:
    task_model: Any = TaskModel(build("bert"), OUTPUTS, pooling="cls")
    model = get_peft_model(task_model, LoraConfig(target_modules=["query"]))
    assert "LORA" in _reason(model, caplog)


def test_trainable_backbone(caplog: pytest.LogCaptureFixture) -> None:
    model = make_model()
    model.get_base_model().backbone.embeddings.LayerNorm.weight.requires_grad = True
    assert "embeddings.LayerNorm.weight" in _reason(model, caplog)


def test_half_precision(caplog: pytest.LogCaptureFixture) -> None:
    model = make_model()
    model.get_base_model().backbone.to(torch.bfloat16)
    assert "bfloat16" in _reason(model, caplog)


def test_steps_aside_for_one_call(caplog: pytest.LogCaptureFixture) -> None:
    model, batch = make_model("bert", "mean"), for_pooling(make_batch("bert"), "mean")
    engine = make_engine(model, precision="fp32")
    with caplog.at_level(logging.INFO, logger="pastina"):
        with torch.autocast("cpu", torch.bfloat16):
            assert engine.logits(batch).shape == (len(MIXED), OUTPUTS)
        model.train()
        torch.manual_seed(1)
        logits = engine.logits(batch)
    torch.manual_seed(1)
    assert torch.equal(logits, ReferenceEngine(model).logits(batch))
    assert ["autocast" in r.getMessage() for r in caplog.records] == [True, False]


def test_word_at_padding_steps_aside() -> None:
    model, batch = make_model("bert", "tokens").eval(), make_batch("bert", (9, 4))
    asked = Batch(batch.inputs, (torch.tensor([1]), torch.tensor([8])), None, 1)
    assert torch.equal(
        make_engine(model, precision="fp32").logits(asked), ReferenceEngine(model).logits(asked)
    )

"""Laws of PASTA over all architectures and padding sides."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, T5Config, T5EncoderModel, T5Model, ViTConfig, ViTModel

from pastina.errors import BackboneError, DataError, RecipeError
from pastina.methods import PastaConfig, train_mode
from pastina.methods.pasta import PastaLayer, find_layers
from pastina.slots import find_slots
from tests.models import CLS, CONFIGS, HIDDEN, LAYERS, PAD, SPECIAL, batch, build, task

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")

every_model = pytest.mark.parametrize("name", list(CONFIGS))
every_side = pytest.mark.parametrize("side", ["right", "left"])


def slots_of(name: str) -> int:
    return len(SPECIAL[name]) + 1


def pasta(name: str, **settings: Any) -> Any:
    settings = {"special_token_ids": SPECIAL[name], "num_slots": slots_of(name), **settings}
    model = get_peft_model(build(name), PastaConfig(**settings))
    fill(model)
    return model.eval()


def fill(model: nn.Module, seed: int = 5) -> None:
    """Large vectors, so that a difference cannot hide."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "pasta_vectors" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


def tables(model: nn.Module) -> Tensor:
    """The vectors as [layers, slots, hidden], shared layers unrolled."""
    found = [p.detach() for n, p in model.named_parameters() if "pasta_vectors" in n]
    return torch.cat([p if p.dim() == 3 else p[None] for p in found])


def blocks(model: PreTrainedModel) -> list[nn.Module]:
    return [model.get_submodule(name) for name in find_layers(model).names]


def hooked(name: str, vectors_LSH: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """Plain transformers: one pre-hook per layer that adds table[slot]."""
    model = build(name)
    slot_BT = find_slots(
        inputs["input_ids"], SPECIAL[name], vectors_LSH.shape[1], inputs["attention_mask"]
    )
    calls = iter(range(len(vectors_LSH)))

    def add(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        vectors_SH = vectors_LSH[next(calls)]
        added = torch.cat([torch.zeros_like(vectors_SH[:1]), vectors_SH])[slot_BT]
        if args:
            return (args[0] + added, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"] + added}

    for block in blocks(model):
        block.register_forward_pre_hook(add, with_kwargs=True)
    with torch.no_grad():
        return model(**inputs).last_hidden_state


def checkpoint(model: PeftModel) -> None:
    enable = getattr(model, "activation_checkpointing_enable", None)  # its name from 5.23 on
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})


@torch.no_grad()
def run(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs).last_hidden_state


def loss(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    weight = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(2))
    return (model(**inputs).last_hidden_state @ weight).square().sum()


@every_side
@every_model
def test_zero_vectors_are_the_frozen_backbone_and_random_ones_are_not(name: str, side: str) -> None:
    inputs = batch(name, side)
    plain = run(build(name), inputs)
    settings = {"special_token_ids": SPECIAL[name], "num_slots": slots_of(name)}
    zero = get_peft_model(build(name), PastaConfig(init_std=0, **settings)).eval()
    assert torch.equal(run(zero, inputs), plain)
    first = get_peft_model(build(name), PastaConfig(**settings)).eval()
    assert not torch.equal(run(first, inputs), plain)


@every_side
@every_model
def test_equal_to_hooks_bit_for_bit(name: str, side: str) -> None:
    model, inputs = pasta(name), batch(name, side)
    assert tables(model).shape == (LAYERS, slots_of(name), HIDDEN)
    assert torch.equal(run(model, inputs), hooked(name, tables(model), inputs))


@every_side
@every_model
def test_only_special_rows_change(name: str, side: str) -> None:
    model, inputs = pasta(name), batch(name, side)
    slot_BT = find_slots(
        inputs["input_ids"], SPECIAL[name], slots_of(name), inputs["attention_mask"]
    )
    pairs: list[tuple[Tensor, Tensor]] = []

    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        pairs.append((args[0] if args else kwargs["hidden_states"], torch.empty(0)))

    def inside(module: nn.Module, args: tuple, kwargs: dict) -> None:
        pairs[-1] = (pairs[-1][0], args[0] if args else kwargs["hidden_states"])

    for layer in [m for m in model.modules() if isinstance(m, PastaLayer)]:
        layer.register_forward_pre_hook(before, with_kwargs=True)
        layer.base_layer.register_forward_pre_hook(inside, with_kwargs=True)
    run(model, inputs)
    assert len(pairs) == LAYERS
    for (given, changed), vectors_SH in zip(pairs, tables(model), strict=True):
        moved_BT = (given != changed).any(-1)
        assert torch.equal(moved_BT, slot_BT > 0)
        for slot in range(1, slots_of(name) + 1):
            at = slot_BT == slot
            assert torch.equal(changed[at], given[at] + vectors_SH[slot - 1])


@every_model
def test_save_load_and_disable(name: str, tmp_path: Path) -> None:
    model, inputs = pasta(name), batch(name)
    expected = run(model, inputs)
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(build(name), tmp_path).eval()
    assert torch.equal(run(again, inputs), expected)
    assert torch.equal(tables(again), tables(model))
    plain = run(build(name), inputs)
    with again.disable_adapter():
        assert torch.equal(run(again, inputs), plain)
    assert torch.equal(run(again, inputs), expected)
    unloaded = again.unload()
    assert torch.equal(run(unloaded, inputs), plain)
    assert unloaded.state_dict().keys() == build(name).state_dict().keys()
    assert not any(isinstance(m, PastaLayer) for m in unloaded.modules())
    host = unloaded.get_submodule(find_layers(unloaded).host_name)
    assert not host._forward_pre_hooks
    assert not [h for h in host._forward_hooks.values() if "pastina" in h.__module__]


@every_model
def test_only_vectors_learn_and_all_of_them(name: str) -> None:
    model, inputs = pasta(name), batch(name)
    train_mode(model)
    loss(model, inputs).backward()
    for key, parameter in model.named_parameters():
        if "pasta_vectors" in key:
            assert parameter.grad is not None, key
            assert parameter.grad.reshape(-1, HIDDEN).abs().amax(1).min() > 0, key
        else:
            assert parameter.grad is None, key
            assert not parameter.requires_grad, key


@every_side
@every_model
def test_padding_and_neighbours_do_not_matter(name: str, side: str) -> None:
    model, inputs = pasta(name).double(), batch(name, side)
    mixed = run(model, inputs)
    for row in range(3):
        real = inputs["attention_mask"][row].bool()
        alone = run(model, {key: value[row : row + 1, real] for key, value in inputs.items()})
        # BERT-like models number positions from the padded start, so left padding shifts them.
        if side == "right" or name in {"t5", "deberta-v2", "modernbert", "roberta"}:
            # ModernBERT turns its positions in fp32 whatever the model's type is.
            near = 1e-5 if name == "modernbert" else 1e-12
            torch.testing.assert_close(mixed[row, real], alone[0], rtol=0, atol=near)
    wide = {
        "input_ids": nn.functional.pad(inputs["input_ids"], (0, 5), value=PAD[name]),
        "attention_mask": nn.functional.pad(inputs["attention_mask"], (0, 5)),
    }
    width = inputs["input_ids"].shape[1]
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(run(model, wide)[:, :width][real], mixed[real], rtol=0, atol=1e-12)


@every_model
def test_found_inside_another_module(name: str) -> None:
    inputs = batch(name)
    config = PastaConfig(
        special_token_ids=SPECIAL[name], num_slots=slots_of(name), modules_to_save=["classifier"]
    )
    model: Any = get_peft_model(task(name), config)
    fill(model)
    with torch.no_grad():
        hidden = hooked(name, tables(model), inputs)
        expected = task(name).classifier(hidden[:, 0])
        assert torch.equal(model.eval()(**inputs)["logits"], expected)
    assert config.target_modules is None, "the user's config stays as it was"
    assert all(n.startswith("bert.") for n in model.peft_config["default"].target_modules)


@pytest.mark.parametrize(
    "name",
    [n for n in CONFIGS if build(n).supports_gradient_checkpointing],  # not ALBERT and MPNet
)
def test_gradient_checkpointing_gives_the_same_gradients(name: str) -> None:
    inputs, gradients = batch(name), []
    for checkpointing in (False, True):
        model = pasta(name, dropout=0.3)
        if checkpointing:
            checkpoint(model)
        train_mode(model)
        torch.manual_seed(11)
        loss(model, inputs).backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        used = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
        assert bool(used) == checkpointing
    assert len(gradients[0]) == len(gradients[1]) > 0
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def test_checkpointing_really_runs_a_layer_twice() -> None:
    runs: list[int] = []
    model, inputs = pasta("bert"), batch("bert")
    checkpoint(model)
    train_mode(model)
    first: Any = model.get_base_model().encoder.layer[0].base_layer
    first.intermediate.register_forward_hook(lambda *_: runs.append(1))
    model(**inputs).last_hidden_state.sum().backward()
    assert len(runs) == 2


def test_albert_has_a_table_per_call_and_can_leave_calls_out() -> None:
    model, inputs = pasta("albert"), batch("albert")
    shapes = [tuple(p.shape) for n, p in model.named_parameters() if "pasta_vectors" in n]
    assert shapes == [(LAYERS, 3, HIDDEN)]
    some = pasta("albert", layers=[0, 2])
    vectors_LSH = torch.zeros(LAYERS, 3, HIDDEN)
    vectors_LSH[[0, 2]] = tables(some)
    assert torch.equal(run(some, inputs), hooked("albert", vectors_LSH, inputs))
    assert not torch.equal(run(some, inputs), run(model, inputs))
    run(model, inputs)
    assert torch.equal(run(model, inputs), run(model, inputs)), "the counter starts anew"


def test_albert_with_two_groups() -> None:
    config = copy.deepcopy(CONFIGS["albert"])
    config.num_hidden_layers, config.num_hidden_groups = 4, 2
    layers = find_layers(type(build("albert"))(config))
    assert layers.indexes == ((0, 1), (2, 3))
    assert layers.num_layers == 4


def test_a_class_token_by_fixed_position() -> None:
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=8,
        patch_size=4,
    )
    torch.manual_seed(0)
    model, image = ViTModel(config).eval(), torch.randn(2, 3, 8, 8)
    with pytest.raises(BackboneError, match="fixed_positions"):
        get_peft_model(copy.deepcopy(model), PastaConfig())
    plain = model(pixel_values=image).last_hidden_state
    zero = get_peft_model(copy.deepcopy(model), PastaConfig(fixed_positions=[0], init_std=0)).eval()
    assert torch.equal(zero(pixel_values=image).last_hidden_state, plain)
    tuned: Any = get_peft_model(model, PastaConfig(fixed_positions=[0, -1])).eval()
    assert tuned.peft_config["default"].num_slots == 2
    fill(tuned)
    seen: list[Tensor] = []
    layer = next(m for m in tuned.modules() if isinstance(m, PastaLayer))
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    layer.base_layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    tuned(pixel_values=image)
    assert (seen[0] != seen[1]).any(-1).nonzero()[:, 1].tolist() == [0, 4, 0, 4]


def test_positions_stand_in_for_missing_ids() -> None:
    inputs = batch("bert")
    del inputs["attention_mask"]
    inputs["input_ids"] = inputs["input_ids"][:1, :8]  # [CLS] six tokens [SEP]
    by_ids = pasta("bert", num_slots=2)
    by_position = pasta("bert", num_slots=2, fixed_positions=[0, 7])
    embeds = by_ids.get_input_embeddings()(inputs["input_ids"])
    assert torch.equal(run(by_ids, inputs), run(by_position, {"inputs_embeds": embeds}))
    assert torch.equal(run(by_ids, inputs), run(by_position, inputs))
    with pytest.raises(DataError, match="input_ids"):
        run(by_ids, {"inputs_embeds": embeds})
    with pytest.raises(DataError, match="does not fit an input of 5"):
        run(by_position, {"inputs_embeds": embeds[:, :5]})
    assert torch.equal(run(by_ids, inputs), run(by_position, inputs)), "errors leave nothing behind"


def test_the_encoder_of_an_encoder_decoder_is_meant() -> None:
    config = copy.deepcopy(CONFIGS["t5"])
    assert isinstance(config, T5Config)
    assert find_layers(T5Model(config)).names == tuple(f"encoder.block.{i}" for i in range(LAYERS))
    assert find_layers(T5EncoderModel(config)).host_name == "encoder"


def test_unknown_architecture_says_what_to_pass() -> None:
    with pytest.raises(BackboneError, match="target_modules"):
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), PastaConfig())


def test_named_layers_are_taken_as_they_are(tmp_path: Path) -> None:
    names = [f"encoder.layer.{i}" for i in range(LAYERS)]
    inputs = batch("bert")
    assert torch.equal(run(pasta("bert", target_modules=names), inputs), run(pasta("bert"), inputs))
    with pytest.raises(BackboneError, match=r"layer\.9.*Near names: encoder\.layer"):
        pasta("bert", target_modules=["encoder.layer.9"])


def test_special_tokens_that_the_model_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"names 120, but BertModel knows 120 tokens \(0 to 119\)"
    ):
        get_peft_model(build("bert"), PastaConfig(special_token_ids=[CLS, 120]))
    wrong = PastaConfig(special_token_ids=[99_999_999])
    for name in CONFIGS:
        with pytest.raises(RecipeError, match=r"names 99999999, but .* knows 120 tokens"):
            get_peft_model(build(name), wrong)
    known = get_peft_model(build("bert"), PastaConfig(special_token_ids=[CLS, 119]))
    known.save_pretrained(str(tmp_path))
    smaller: Any = build("bert")
    smaller.resize_token_embeddings(119)
    with pytest.raises(RecipeError, match="names 119, but BertModel knows 119 tokens"):
        PeftModel.from_pretrained(smaller, tmp_path)

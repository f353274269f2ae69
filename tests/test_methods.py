"""Laws of every method on every architecture; tests/test_pasta_architectures.py has those of PASTA."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pastina.errors import BackboneError, PastinaError, RecipeError
from pastina.method_options import PeftOptions
from pastina.methods import BitFitConfig, LinearConfig, attach, load, others, train_mode
from pastina.methods._peft import known_types
from pastina.methods.bottleneck import Bottleneck, BottleneckConfig
from pastina.methods.prompts import PromptedModel
from pastina.recipe import METHOD_OPTIONS
from tests.methods import (
    CASES,
    IN_FRONT,
    PAIRS,
    REFUSED,
    P,
    learned,
    model_of,
    own,
    padded,
    plain,
)
from tests.models import batch, build

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")

every_pair = pytest.mark.parametrize(("case", "name"), PAIRS, ids=lambda part: part)
SOME = [pair for pair in PAIRS if pair[1] in ("bert", "modernbert")]


def fill(model: nn.Module, seed: int = 5, adapter: str = "default") -> None:
    """Large changes, so that a difference cannot hide."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in learned(model).items():
            if adapter not in name.split("."):
                continue
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.5)


@torch.no_grad()
def run(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs).logits


def test_every_method_is_tried() -> None:
    tried = {options.name for options in CASES.values()}  # type: ignore[attr-defined]
    assert tried | {"pasta", "linear", "full"} == set(METHOD_OPTIONS)


@pytest.mark.parametrize(("case", "name"), sorted(REFUSED))
def test_what_does_not_fit_is_refused_in_a_sentence(case: str, name: str) -> None:
    with pytest.raises((BackboneError, RecipeError)) as caught:
        model_of(case, name)
    text = str(caught.value)
    assert text.endswith(".")
    assert "\n" not in text
    assert any(hint in text for hint in ("Choose", "choose", "method.add", "method.targets"))
    assert "TaskModel" not in text, "the user knows the backbone"


@pytest.mark.parametrize(
    ("config", "settings", "text"),
    [
        (BottleneckConfig, {"reduction": "a"}, "reduction must be a number from 1; seen 'a'"),
        (BottleneckConfig, {"scaling": [1]}, r"scaling must be a number above 0; seen \[1\]"),
        (BottleneckConfig, {"activation": ["relu"]}, "activation must be one of relu"),
        (BottleneckConfig, {"style": []}, "style must be one of houlsby"),
        (BitFitConfig, {"add": "no"}, "add must be true or false; seen 'no'"),
        (BitFitConfig, {"modules_to_save": "score"}, "modules_to_save.*the text 'score'"),
        (LinearConfig, {"modules_to_save": 5}, "modules_to_save.*seen 5"),
    ],
)
def test_wrong_settings_of_other_methods(config: Any, settings: dict[str, Any], text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        config(**settings)


@every_pair
def test_laws(case: str, name: str, tmp_path: Path) -> None:
    inputs = batch(name)
    model, frozen = model_of(case, name), run(plain(name), inputs)
    backbone = {k: v.clone() for k, v in plain(name).backbone.state_dict().items()}

    # the start is the frozen backbone, where the method has a zero
    assert torch.equal(run(model, inputs), frozen) == (case not in IN_FRONT)

    # all that was added learns, and nothing else gets a gradient
    fill(model)
    answer = run(model, inputs)
    assert not torch.equal(answer, frozen)
    train_mode(model)
    model(**inputs).logits.square().sum().backward()
    for key, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, key
        assert parameter.grad is None or parameter.grad.abs().max() > 0, key

    # a step leaves the backbone as it was, bit for bit
    torch.optim.SGD(learned(model).values(), lr=1e-3, weight_decay=0.1).step()
    model.eval()
    moved = run(model, inputs)
    assert not torch.equal(moved, answer)
    with model.disable_adapter():
        assert torch.equal(run(model, inputs), frozen)
    assert torch.equal(run(model, inputs), moved)

    # saved and loaded
    model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    method = CASES[case].name  # type: ignore[attr-defined]
    again = load(plain(name), tmp_path, method, tensors).eval()
    torch.testing.assert_close(run(again, inputs), moved, rtol=0, atol=0)
    assert not learned(again) or isinstance(again, PromptedModel)

    # a second adapter changes nothing of the first
    config = copy.deepcopy(model.peft_config["default"])
    model.add_adapter("other", config)
    model.set_adapter("other")
    fill(model, 6, "other")
    model.eval()
    assert not torch.equal(run(model, inputs), moved)
    model.set_adapter("default")
    assert torch.equal(run(model, inputs), moved)
    model.delete_adapter("other")
    assert torch.equal(run(model, inputs), moved)

    now = {k.replace("base_layer.", ""): v for k, v in backbone_of(model).state_dict().items()}
    assert all(torch.equal(now[key], value) for key, value in backbone.items())


def backbone_of(model: Any) -> Any:
    return model.get_base_model().backbone


@every_pair
def test_padding_and_neighbours_do_not_matter(case: str, name: str) -> None:
    model, inputs = model_of(case, name, "mean"), batch(name)
    fill(model)
    model = model.double()
    mixed = run(model, inputs)
    near = 1e-5 if name == "modernbert" else 1e-12  # its positions are turned in fp32
    torch.testing.assert_close(run(model, padded(inputs, name, 5)), mixed, rtol=0, atol=near)
    for row in range(3):
        real = inputs["attention_mask"][row].bool()
        alone = run(model, {key: value[row : row + 1, real] for key, value in inputs.items()})
        torch.testing.assert_close(alone[0], mixed[row], rtol=0, atol=near)


@pytest.mark.parametrize(("case", "name"), SOME, ids=lambda part: part)
def test_bf16(case: str, name: str) -> None:
    torch.manual_seed(0)
    model, inputs = model_of(case, name), batch(name)
    fill(model)
    exact = run(model, inputs)
    train_mode(model)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(**inputs).logits.float()
    logits.square().sum().backward()
    assert all(p.grad is not None for p in learned(model).values())
    assert all(p.dtype == torch.float32 for p in learned(model).values())
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        near = run(model, inputs)
    assert near.dtype == torch.float32
    assert (near - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize(("case", "name"), SOME, ids=lambda part: part)
def test_gradient_checkpointing_gives_the_same_gradients_or_is_refused(
    case: str, name: str
) -> None:
    inputs, gradients = batch(name), []
    for checkpointing in (False, True):
        model = model_of(case, name)
        fill(model)
        if checkpointing:
            backbone = backbone_of(model)
            enable = getattr(backbone, "activation_checkpointing_enable", None)  # from 5.23 on
            (enable or backbone.gradient_checkpointing_enable)({"use_reentrant": False})
        train_mode(model)
        torch.manual_seed(11)
        if checkpointing and case in ("prefix_tuning", "p_tuning_v2"):
            with pytest.raises(BackboneError, match="gradient checkpointing"):
                model(**inputs)
            return
        model(**inputs).logits.square().sum().backward()
        gradients.append([p.grad for p in learned(model).values() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 2
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize(("case", "name"), SOME, ids=lambda part: part)
def test_the_backbones_own_dropout_is_off_while_learning(case: str, name: str) -> None:
    model = model_of(case, name)
    train_mode(model)
    inner = model.get_base_model()
    assert inner.training
    assert inner.dropout.training
    assert inner.classifier.modules_to_save["default"].training
    own_names = {key for key, _ in build(name).named_modules()}
    for key, module in backbone_of(model).named_modules():
        parts = key.split(".")
        is_own = key.replace(".base_layer", "") in own_names and (
            "base_layer" in parts or not hasattr(module, "base_layer")
        )
        assert not (is_own and module.training), key
    if case == "lora-everything":
        drops = [m for k, m in inner.named_modules() if k.endswith("lora_dropout.default")]
        assert drops
        assert all(drop.training and drop.p == 0.1 for drop in drops)


# --- in front of the text -------------------------------------------------------------------------


def by_hand(model: Any, name: str, case: str, inputs: dict[str, Tensor]) -> Any:
    """The same by transformers alone: P tokens in front whose numbers are overwritten on the way."""
    backbone: Any = build(name)
    ids_BT = inputs["input_ids"]
    rows = len(ids_BT)
    stand_in = torch.full((rows, P), 50)
    longer = {
        "input_ids": torch.cat([stand_in, ids_BT], 1),
        "attention_mask": nn.functional.pad(inputs["attention_mask"], (P, 0), value=1),
    }
    with torch.no_grad():
        learned_PX = model.prompt_encoder["default"](torch.arange(P))

    def overwrite(numbers: Tensor) -> Any:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            return torch.cat([numbers.expand(rows, -1, -1), output[:, P:]], 1)

        return hook

    if case.startswith("prompt"):
        host: Any = getattr(backbone, "encoder", backbone) if name == "t5" else backbone
        host.get_input_embeddings().register_forward_hook(overwrite(learned_PX))
    else:
        per_layer = learned_PX.view(P, -1, 2, backbone.config.hidden_size)
        for i, layer in enumerate(backbone.encoder.layer):
            layer.attention.self.key.register_forward_hook(overwrite(per_layer[:, i, 0]))
            layer.attention.self.value.register_forward_hook(overwrite(per_layer[:, i, 1]))
    with torch.no_grad():
        return backbone, backbone(**longer).last_hidden_state[:, P:]


@pytest.mark.parametrize(
    ("case", "name"),
    [pair for pair in PAIRS if pair[0] in IN_FRONT[:3]],
    ids=lambda part: part,
)
@pytest.mark.parametrize("pooling", ["cls", "mean", "tokens", "pooler"])
def test_heads_read_the_text_and_not_what_stands_in_front(
    case: str, name: str, pooling: str
) -> None:
    if pooling == "pooler" and getattr(build(name), "pooler", None) is None:
        pytest.skip("it has no pooler")
    model, inputs = model_of(case, name, pooling), batch(name)
    fill(model)
    backbone, hidden_BTH = by_hand(model, name, case, inputs)
    head = model.get_base_model().classifier.modules_to_save["default"]
    mask_BT1 = inputs["attention_mask"][..., None]
    with torch.no_grad():
        if pooling == "cls":
            read = hidden_BTH[:, 0]
        elif pooling == "mean":
            read = (hidden_BTH * mask_BT1).sum(1) / mask_BT1.sum(1)
        elif pooling == "tokens":
            read = hidden_BTH
        elif name == "albert":
            read = torch.tanh(backbone.pooler(hidden_BTH[:, 0]))
        else:
            read = backbone.pooler(hidden_BTH)
        expected = head(read)
    seen = run(model, inputs)
    assert seen.shape == expected.shape
    if pooling == "tokens":
        seen, expected = seen * mask_BT1, expected * mask_BT1
    torch.testing.assert_close(seen, expected, rtol=0, atol=2e-5)


def test_a_prefix_made_by_a_net_is_stored_as_it_came_out(tmp_path: Path) -> None:
    model = model_of("prefix_tuning", "bert")
    assert any("transform" in key for key in own(model))
    model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert tensors["prompt_embeddings"].shape == (P, 2 * 3 * 16)
    assert len(tensors) == 3


def test_token_types_stay_with_their_tokens() -> None:
    inputs = batch("bert")
    types = (torch.arange(inputs["input_ids"].shape[1]) % 2).expand_as(inputs["input_ids"])
    for case in IN_FRONT:
        model = model_of(case, "bert")
        zeros = run(model, {**inputs, "token_type_ids": torch.zeros_like(types)})
        assert torch.equal(run(model, inputs), zeros)
        assert not torch.equal(run(model, {**inputs, "token_type_ids": types}), zeros)


@pytest.mark.parametrize("case", IN_FRONT)
def test_a_bare_backbone_says_as_much_as_before(case: str) -> None:
    inputs = batch("bert")
    model: Any = attach(build("bert"), CASES[case]).eval()
    with torch.no_grad():
        output = model(*inputs.values(), output_hidden_states=True)
    shape = (*inputs["input_ids"].shape, 16)
    assert [state.shape for state in output.hidden_states] == [shape] * 4
    assert output.last_hidden_state.shape == shape
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
    assert output.pooler_output.shape == (3, 16)


def test_prompts_begin_as_words_or_at_random() -> None:
    words = build("bert").get_input_embeddings().weight
    for case, is_word in (("prompt_tuning", True), ("prompt_tuning-random", False)):
        rows = model_of(case, "bert").prompt_encoder["default"].embedding.weight
        found = [(words == row).all(1).any().item() for row in rows]
        assert found == [is_word] * P


def test_nobody_mixes_adapters_in_a_batch_unseen() -> None:
    inputs = batch("bert")
    for case in ("bitfit", "pfeiffer", "prompt_tuning", "prefix_tuning"):
        with pytest.raises(PastinaError, match="one for each row"):
            model_of(case, "bert")(**inputs, adapter_names=["default"] * 3)


# --- merging --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "t5", "modernbert", "distilbert"])
def test_bitfit_merges_and_comes_back(name: str) -> None:
    case = "bitfit-add"
    model, inputs = model_of(case, name), batch(name)
    fill(model)
    answer, frozen = run(model, inputs), run(plain(name), inputs)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.merge_adapter()
    torch.testing.assert_close(run(model, inputs), answer, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(run(model, inputs), answer)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(run(model, inputs), frozen)
    merged = model.merge_and_unload()
    assert not [m for m in merged.modules() if "BitFit" in type(m).__name__]
    torch.testing.assert_close(run(merged, inputs), answer, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["houlsby", "pfeiffer", "parallel"])
def test_bottlenecks_do_not_merge_but_unload(case: str) -> None:
    model, inputs = model_of(case, "bert"), batch("bert")
    fill(model)
    with pytest.raises(PastinaError, match="cannot be merged"):
        model.merge_adapter()
    unloaded = model.unload()
    assert not [h for m in unloaded.modules() for h in m._forward_pre_hooks.values()]
    fresh = plain("bert").backbone
    assert unloaded.backbone.state_dict().keys() == fresh.state_dict().keys()
    with torch.no_grad():
        seen, expected = (m(**inputs).last_hidden_state for m in (unloaded.backbone, fresh))
    assert torch.equal(seen, expected)


# --- whatever else PEFT has -----------------------------------------------------------------------

_SMALL: dict[str, dict[str, Any]] = {
    "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 20},
    "IA3": {"feedforward_modules": []},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 4},
    "PSOFT": {"r": 4},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 4},
    "TRAINABLE_TOKENS": {"token_indices": [101], "target_modules": ["word_embeddings"]},
    "VBLORA": {"vector_length": 8, "num_vectors": 8},
    "WAVEFT": {"n_frequency": 20},
}
_NOT_OURS = sorted(set(known_types()) - {"PASTA", "LINEAR", "FULL", "BITFIT", "BOTTLENECK"})
_LEFT_OUT = {"BOFT"}  # compiles for a GPU when it is first used


@pytest.mark.parametrize("kind", [k for k in _NOT_OURS if k not in _LEFT_OUT | set(others.REFUSED)])
@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
def test_every_type_of_peft_by_its_name(kind: str, tmp_path: Path) -> None:
    fields = known_types()[kind].__dataclass_fields__
    values: dict[str, Any] = {}
    if "target_modules" in fields:
        values["target_modules"] = ["query", "value"]
    if "num_virtual_tokens" in fields:
        values["num_virtual_tokens"] = P
    options = PeftOptions(type=kind, config={**values, **_SMALL.get(kind, {})})
    base, inputs = plain("bert"), batch("bert")
    backbone = {key: value.clone() for key, value in base.backbone.state_dict().items()}
    torch.manual_seed(0)
    model: Any = attach(base, options, modules_to_save=["classifier"], task_type="SEQ_CLS")
    before = run(model.eval(), inputs)
    optimizer = torch.optim.AdamW(learned(model).values(), lr=1e-2)
    for _ in range(2):
        train_mode(model)
        model(**inputs).logits[:, 0].sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = run(model.eval(), inputs)
    assert after[:, 0].sum() < before[:, 0].sum()
    now = {k.replace("base_layer.", ""): v for k, v in backbone_of(model).state_dict().items()}
    assert all(torch.equal(now[key], value) for key, value in backbone.items())
    model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    again = load(plain("bert"), tmp_path, "peft", tensors).eval()
    assert torch.equal(run(again, inputs), after)


def test_bottleneck_by_hand() -> None:
    net = Bottleneck(2, BottleneckConfig(reduction=2))
    with torch.no_grad():
        net.down.weight.copy_(torch.tensor([[1.0, 1.0]]))
        net.up.weight.copy_(torch.tensor([[2.0], [3.0]]))
        for scaling, given, expected in (
            (1.0, (1.0, -2.0), (1.0, -2.0)),
            (1.0, (2.0, -1.0), (4.0, 2.0)),
            (4.0, (2.0, -1.0), (10.0, 11.0)),
        ):
            net.scaling = scaling
            state = torch.tensor(given)
            assert torch.equal(state + net(state), torch.tensor(expected))

"""PASTA as a citizen of PEFT, transformers and torch."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForSequenceClassification,
    PeftConfig,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertForSequenceClassification, Trainer, TrainingArguments

from pastina.errors import AdapterError, DataError
from pastina.methods import FullConfig, LinearConfig, PastaConfig, attach, train_mode
from pastina.methods.pasta import PastaLayer
from pastina.recipe import PastaOptions
from tests.models import CLS, LAYERS, SEP, batch, bert, build, task

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")

IDS = (CLS, SEP)


def settings(**changes: Any) -> PastaConfig:
    return PastaConfig(
        **{"special_token_ids": IDS, "num_slots": 3, "init_std": 1.0, "dropout": 0.0, **changes}
    )


def with_adapters(*names: str, heads: bool = True) -> Any:
    """One backbone with adapters that differ in their settings."""
    kinds: list[dict[str, Any]] = [{}, {"share": "by_token"}, {"share": "all", "layers": [1]}]
    saved = ["classifier"] if heads else None
    configs = [settings(modules_to_save=saved, **kinds[i % 3]) for i in range(len(names))]
    torch.manual_seed(3)
    model = get_peft_model(task(), configs[0], adapter_name=names[0])
    for name, config in zip(names[1:], configs[1:], strict=True):
        model.add_adapter(name, config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "modules_to_save" in key:
                parameter.add_(torch.randn_like(parameter))
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module, inputs: dict[str, Tensor], **more: Any) -> Tensor:
    return model(**inputs, **more)["logits"]


def test_many_adapters() -> None:
    model, inputs = with_adapters("red", "green", "blue"), batch("bert")
    answers = {}
    for name in ("red", "green", "blue"):
        model.set_adapter(name)
        answers[name] = logits(model, inputs)
        learning = {n.split(".")[-1] for n, p in model.named_parameters() if p.requires_grad}
        assert learning == {name, "weight", "bias"}
    assert not torch.equal(answers["red"], answers["green"])
    assert not torch.equal(answers["red"], answers["blue"])
    model.set_adapter("red")
    model.delete_adapter("green")
    assert torch.equal(logits(model, inputs), answers["red"])
    assert not [n for n, _ in model.named_parameters() if "green" in n]
    with pytest.raises(ValueError, match="green"):
        model.set_adapter("green")
    model.set_adapter("blue")
    assert torch.equal(logits(model, inputs), answers["blue"])
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), logits(task(), inputs))
    model.set_adapter("red")
    assert torch.equal(logits(model, inputs), answers["red"])


def test_adding_an_adapter_changes_nothing_for_the_others() -> None:
    model, inputs = with_adapters("red"), batch("bert")
    before = logits(model, inputs)
    model.add_adapter("green", settings(modules_to_save=["classifier"]))
    assert torch.equal(logits(model, inputs), before)
    frozen = {n for n, p in model.named_parameters() if p.requires_grad}
    assert frozen
    assert not any("green" in n for n in frozen)


def test_the_last_adapter_goes_and_the_backbone_stays() -> None:
    model, inputs = with_adapters("red"), batch("bert")
    model.base_model.delete_adapter("red")
    assert torch.equal(logits(model.base_model.model, inputs), logits(task(), inputs))


def test_two_active_adapters_add_up() -> None:
    model = with_adapters("red", "blue", heads=False)
    seen: list[Tensor] = []
    layer = [m for m in model.modules() if isinstance(m, PastaLayer)][1]
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    layer.base_layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.base_model.set_adapter(["red", "blue"])
    logits(model, {"input_ids": torch.tensor([[CLS, 5, SEP]])})
    both = layer.pasta_vectors["red"] + layer.pasta_vectors["blue"][[0, 1, 1]]
    torch.testing.assert_close((seen[1] - seen[0])[0, [0, 2]], both[:2].detach(), rtol=0, atol=1e-5)


def test_rows_with_their_own_adapters() -> None:
    model, inputs = with_adapters("red", "green", "blue"), batch("bert")
    names = ["green", "__base__", "red", "blue", "red"]
    rows = [0, 1, 2, 0, 0]
    mixed = {key: value[rows] for key, value in inputs.items()}
    got = logits(model, mixed, adapter_names=names)
    for place, (name, row) in enumerate(zip(names, rows, strict=True)):
        one = {key: value[row : row + 1] for key, value in inputs.items()}
        if name == "__base__":
            with model.disable_adapter():
                alone = logits(model, one)
        else:
            model.set_adapter(name)
            alone = logits(model, one)
        torch.testing.assert_close(got[place : place + 1], alone, rtol=0, atol=1e-6)
    assert not any(m._forward_pre_hooks for m in model.modules() if isinstance(m, PastaLayer))
    assert torch.equal(
        logits(model, inputs, adapter_names=["__base__"] * 3), logits(task(), inputs)
    )


def test_rows_with_their_own_adapters_pass_gradients() -> None:
    model, inputs = with_adapters("red", "green", heads=False), batch("bert")
    model.set_requires_grad(["red", "green"])
    model(**inputs, adapter_names=["red", "__base__", "green"])["logits"].square().sum().backward()
    touched = {
        (n.split(".")[-1], bool(p.grad is not None and p.grad.abs().sum() > 0))
        for n, p in model.named_parameters()
        if "pasta_vectors" in n
    }
    assert touched == {("red", True), ("green", True)}


def test_wrong_adapter_names_are_refused() -> None:
    model, inputs = with_adapters("tickets", "spam"), batch("bert")
    with pytest.raises(AdapterError, match=r"no adapter 'ticket'.*Near names: tickets"):
        model(**inputs, adapter_names=["ticket", "spam", "spam"])
    with pytest.raises(DataError, match="2 names, the batch has 3 rows"):
        model(**inputs, adapter_names=["spam", "spam"])
    with pytest.raises(DataError, match="2 names, the batch has 3 rows"):
        model(*inputs.values(), adapter_names=["spam", "spam"])
    linear = get_peft_model(task(), LinearConfig(modules_to_save=["classifier"]))
    with pytest.raises(AdapterError, match="no adapter 'other'"):
        linear(**inputs, adapter_names=["other"] * 3)
    full = get_peft_model(task(), FullConfig())
    with pytest.raises(AdapterError, match="no adapter 'other'"):
        full(**inputs, adapter_names=["other"] * 3)
    assert logits(model, inputs, adapter_names=["spam"] * 3).shape == (3, 2)


def test_task_types_of_peft(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = BertForSequenceClassification(bert())
    plain.save_pretrained(str(tmp_path / "backbone"))
    plain = BertForSequenceClassification.from_pretrained(tmp_path / "backbone")
    model = get_peft_model(plain, settings(task_type="SEQ_CLS")).eval()
    inputs = batch("bert")
    expected = logits(model, inputs)
    mixed = logits(model, inputs, adapter_names=["default", "__base__", "default"])
    torch.testing.assert_close(mixed[[0, 2]], expected[[0, 2]])
    assert not torch.equal(mixed[1], expected[1])
    model.save_pretrained(str(tmp_path / "adapter"))
    again = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(logits(again, inputs), expected)
    fresh = BertForSequenceClassification.from_pretrained(tmp_path / "backbone")
    trained = PeftModel.from_pretrained(fresh, tmp_path / "adapter", is_trainable=True)
    assert trained.get_nb_trainable_parameters()[0] == LAYERS * 3 * 16 + 34


def test_auto_class_for_features(tmp_path: Path) -> None:
    build("bert").save_pretrained(str(tmp_path / "backbone"))
    plain = type(build("bert")).from_pretrained(tmp_path / "backbone")
    model = get_peft_model(plain, settings(task_type="FEATURE_EXTRACTION")).eval()
    expected = model(**batch("bert")).last_hidden_state
    model.save_pretrained(str(tmp_path / "adapter"))
    again = AutoPeftModelForFeatureExtraction.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(again(**batch("bert")).last_hidden_state, expected)


def test_the_file_holds_the_tables_and_the_head_only(tmp_path: Path) -> None:
    model = with_adapters("red", "green")
    model.save_pretrained(str(tmp_path))
    for name, shape in (("red", (3, 16)), ("green", (2, 16))):
        tensors = load_file(tmp_path / name / "adapter_model.safetensors")
        prefix = "base_model.model."
        assert {key: tuple(value.shape) for key, value in tensors.items()} == {
            **{f"{prefix}bert.encoder.layer.{i}.pasta_vectors": shape for i in range(LAYERS)},
            f"{prefix}classifier.weight": (2, 16),
            f"{prefix}classifier.bias": (2,),
        }
    config = PeftConfig.from_pretrained(str(tmp_path / "green"))
    assert isinstance(config, PastaConfig)
    assert (config.special_token_ids, config.num_slots, config.share) == (IDS, 3, "by_token")
    assert config.target_modules == tuple(f"bert.encoder.layer.{i}" for i in range(LAYERS))


@pytest.mark.parametrize("low_memory", [False, True])
def test_load_a_second_adapter(tmp_path: Path, low_memory: bool) -> None:
    inputs = batch("bert")
    model = with_adapters("red", "green")
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(
        task(), tmp_path / "green", adapter_name="second", low_cpu_mem_usage=low_memory
    ).eval()
    again.load_adapter(tmp_path / "red", "first", low_cpu_mem_usage=low_memory)
    for old, new in (("green", "second"), ("red", "first")):
        model.set_adapter(old)
        again.set_adapter(new)
        assert torch.equal(logits(model, inputs), logits(again, inputs))


def test_parameters_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with_adapters("red").print_trainable_parameters()
    assert "trainable params: 178 ||" in capsys.readouterr().out


def test_injection_without_a_peft_model() -> None:
    inputs = batch("bert")
    torch.manual_seed(3)
    wrapped = get_peft_model(build("bert"), settings()).eval()
    torch.manual_seed(3)
    plain = inject_adapter_in_model(settings(), build("bert")).eval()
    assert torch.equal(plain(**inputs).last_hidden_state, wrapped(**inputs).last_hidden_state)


def test_copies_and_pickles_are_independent() -> None:
    inputs = batch("bert")
    model = with_adapters("red")
    expected = logits(model, inputs)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other, inputs), expected)
        context = [m.context for m in other.modules() if isinstance(m, PastaLayer)]
        assert len({id(c) for c in context}) == 1
        assert (
            context[0] is not next(m for m in model.modules() if isinstance(m, PastaLayer)).context
        )
        with torch.no_grad():
            for key, parameter in other.named_parameters():
                if "pasta_vectors" in key:
                    parameter.zero_()
        assert torch.equal(logits(model, inputs), expected)
        host = other.unload().bert
        assert not host._forward_pre_hooks
        assert torch.equal(logits(model, inputs), expected)


def test_trainer_of_transformers(tmp_path: Path) -> None:
    inputs = batch("bert")
    rows: Any = [
        {**{key: value[i % 3] for key, value in inputs.items()}, "labels": i % 2} for i in range(8)
    ]
    model = attach(
        task(), PastaOptions(), special_token_ids=IDS, num_slots=3, modules_to_save=["classifier"]
    )
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="steps",
        save_steps=2,
        dataloader_pin_memory=False,
        label_names=["labels"],
        remove_unused_columns=False,
    )
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    for name, parameter in model.named_parameters():
        moved = not torch.equal(parameter, before[name])
        assert moved == ("pasta_vectors" in name or "modules_to_save" in name), name
    again = PeftModel.from_pretrained(task(), tmp_path / "checkpoint-2").eval()
    assert torch.equal(logits(again, inputs), logits(model.eval(), inputs))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.filterwarnings("ignore")  # torch's own
def test_compiled_model_gives_the_same(backend: str) -> None:
    """Inductor answers only: its C++ for gradients takes a minute to compile, and is torch's affair."""
    torch._dynamo.reset()
    is_training = backend != "inductor"
    inputs = batch("bert")
    model = get_peft_model(build("bert"), settings()).eval()
    expected = model(**inputs).last_hidden_state
    graphs: list[object] = []
    inner = torch._dynamo.lookup_backend(backend)

    def count(graph: torch.fx.GraphModule, example: list[Tensor]) -> object:
        graphs.append(graph)
        return inner(graph, example)

    compiled = torch.compile(model, backend=count)
    with torch.set_grad_enabled(is_training):
        out = compiled(**inputs).last_hidden_state
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
        assert len(graphs) == 1, "one graph, no break"
        with pytest.raises(RuntimeError, match="more than 3 special tokens"):
            compiled(input_ids=torch.full_like(inputs["input_ids"], SEP))
    if not is_training:
        return
    out.square().sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(gradients) == LAYERS
    model.zero_grad()
    model(**inputs).last_hidden_state.square().sum().backward()
    plain = [p.grad for p in model.parameters() if p.grad is not None]
    for one, other in zip(gradients, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


_TWO_PROCESSES = """
import sys, warnings
warnings.filterwarnings("ignore")
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
sys.path.insert(0, sys.argv[3])
from pastina.methods import PastaConfig, attach, train_mode
from pastina.recipe import PastaOptions
from tests.models import CLS, SEP, batch, task

torch.set_num_threads(1)
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
inputs = {key: value[:2] for key, value in batch("bert").items()}
labels = torch.tensor([0, 1])

def fresh():
    torch.manual_seed(4)
    model = attach(task(), PastaOptions(dropout=0.0), special_token_ids=(CLS, SEP), num_slots=3,
                   modules_to_save=["classifier"])
    train_mode(model)
    model.get_base_model().dropout.p = 0.0
    return model

alone = fresh()
alone(**inputs, labels=labels)["loss"].backward()
model = fresh()
wrapped = DistributedDataParallel(model)
mine = {key: value[rank:rank + 1] for key, value in inputs.items()}
wrapped(**mine, labels=labels[rank:rank + 1])["loss"].backward()
count = 0
for one, other in zip(alone.parameters(), model.parameters()):
    assert (one.grad is None) == (other.grad is None)
    if one.grad is not None:
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)
        count += 1
assert count == 5, count
dist.destroy_process_group()
print("same gradients")
"""


def test_two_processes_get_the_gradients_of_one(tmp_path: Path) -> None:
    root = str(Path(__file__).parents[1])
    command = [sys.executable, "-c", _TWO_PROCESSES]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store"), root],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert "same gradients" in out, err
        assert process.returncode == 0, err


def test_learning_moves_only_what_should() -> None:
    inputs, labels = batch("bert"), torch.tensor([0, 1, 1])
    model = attach(
        task(), PastaOptions(), special_token_ids=IDS, num_slots=3, modules_to_save=["classifier"]
    )
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    train_mode(model)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    torch.manual_seed(0)
    losses = []
    for _ in range(60):
        loss = model(**inputs, labels=labels)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in frozen.items())

"""Pooling and head by hand. Shape letters: B rows, T tokens, H hidden, C outputs."""

import pytest
import torch
from torch import Tensor

from pastina.errors import BackboneError
from pastina.heads import TaskModel
from tests.models import build

IDS_BT = torch.tensor([[101, 5, 6, 102, 0], [101, 7, 8, 9, 102]])
MASK_BT = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
LEFT_IDS_BT = torch.tensor([[0, 101, 5, 6, 102], [101, 7, 8, 9, 102]])
LEFT_MASK_BT = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])


def task_model(pooling: str) -> TaskModel:
    return TaskModel(build("bert"), 3, pooling=pooling, dropout=0.5).eval()


def head(model: TaskModel, pooled: Tensor) -> Tensor:
    return pooled @ model.classifier.weight.T + model.classifier.bias


@pytest.mark.parametrize(
    ("ids", "mask"), [(IDS_BT, MASK_BT), (LEFT_IDS_BT, LEFT_MASK_BT)], ids=["right", "left"]
)
@pytest.mark.parametrize("pooling", ["cls", "mean"])
@torch.no_grad()
def test_poolings_ignore_padding_on_either_side(pooling: str, ids: Tensor, mask: Tensor) -> None:
    model = task_model(pooling)
    hidden_BTH = model.backbone(input_ids=ids, attention_mask=mask).last_hidden_state
    rows = [hidden_TH[row_mask == 1] for hidden_TH, row_mask in zip(hidden_BTH, mask, strict=True)]
    pooled_BH = torch.stack([row[0] if pooling == "cls" else row.mean(0) for row in rows])
    logits_BC = model(input_ids=ids, attention_mask=mask).logits
    assert logits_BC.shape == (2, 3)
    torch.testing.assert_close(logits_BC, head(model, pooled_BH))


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@torch.no_grad()
def test_without_a_mask_every_token_counts(pooling: str) -> None:
    model = task_model(pooling)
    with_mask = model(input_ids=IDS_BT, attention_mask=torch.ones_like(IDS_BT)).logits
    torch.testing.assert_close(model(input_ids=IDS_BT).logits, with_mask)


@torch.no_grad()
def test_the_pooler_reads_the_first_token() -> None:
    model = task_model("pooler")
    hidden_BTH = model.backbone(input_ids=IDS_BT, attention_mask=MASK_BT).last_hidden_state
    dense = model.backbone.pooler.dense
    pooled_BH = torch.tanh(hidden_BTH[:, 0] @ dense.weight.T + dense.bias)
    logits_BC = model(input_ids=IDS_BT, attention_mask=MASK_BT).logits
    torch.testing.assert_close(logits_BC, head(model, pooled_BH))


@torch.no_grad()
def test_tokens_are_each_for_themselves() -> None:
    model = task_model("tokens")
    hidden_BTH = model.backbone(input_ids=IDS_BT, attention_mask=MASK_BT).last_hidden_state
    logits_BTC = model(input_ids=IDS_BT, attention_mask=MASK_BT).logits
    assert logits_BTC.shape == (2, 5, 3)
    torch.testing.assert_close(logits_BTC, head(model, hidden_BTH))


def test_a_checkpoint_without_pooler_cannot_pool_by_it() -> None:
    with pytest.raises(BackboneError, match=r"no trained pooler.*'cls' or 'mean'"):
        TaskModel(build("distilbert"), 2, pooling="pooler")
    with pytest.raises(BackboneError, match="Unknown pooling 'max'"):
        TaskModel(build("bert"), 2, pooling="max")


def test_the_head_has_a_generator_of_its_own() -> None:
    backbone = build("bert")
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = TaskModel(backbone, 2, pooling="cls", seed=5)
    # nn.Linear's own start is thrown away, so only the seed of the head counts
    torch.set_rng_state(before)
    torch.rand(7)
    other = TaskModel(backbone, 2, pooling="cls", seed=5)
    assert torch.equal(one.classifier.weight, other.classifier.weight)
    third = TaskModel(backbone, 2, pooling="cls", seed=6)
    assert not torch.equal(one.classifier.weight, third.classifier.weight)


def test_labels_are_not_taken_silently() -> None:
    with pytest.raises(TypeError, match="loss belongs to the kind"):
        task_model("cls")(input_ids=IDS_BT, labels=torch.tensor([0, 1]))


@torch.no_grad()
def test_token_types_reach_the_backbone() -> None:
    model = task_model("cls")
    types_BT = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 1, 1, 1]])
    plain = model(input_ids=IDS_BT, attention_mask=MASK_BT).logits
    typed = model(input_ids=IDS_BT, attention_mask=MASK_BT, token_type_ids=types_BT).logits
    assert torch.equal(plain[0], typed[0])
    assert not torch.allclose(plain[1], typed[1])

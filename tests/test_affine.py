"""Frozen linear layers in three precisions."""

import pytest
import torch
from torch import Tensor

from pastina.engine import affine, native
from pastina.engine.affine import BLOCK, Precision, choose_precision, make_affine
from pastina.errors import RecipeError
from tests.models import some_keys

ROWS = (1, 5, 32, 33, BLOCK, BLOCK + 7, 2 * BLOCK + 40)
NEAR: dict[Precision, float] = {"fp32": 1e-6, "bf16": 2e-2, "int8": 2e-2}


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.fixture(params=[True, False], ids=["mkl", "onednn"])
def _either_library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(affine, "_likes_mkl", lambda: request.param)


@pytest.mark.usefixtures("_either_library")
@pytest.mark.parametrize("precision", NEAR)
@pytest.mark.parametrize("num_rows", ROWS)
def test_products(num_rows: int, precision: Precision) -> None:
    weight, bias = numbers(24, 40), numbers(24, seed=1)
    x, grad = numbers(num_rows, 40, seed=2), numbers(num_rows, 24, seed=3)
    layer, limit = make_affine(weight, bias, precision), NEAR[precision]
    forward = x.double() @ weight.double().t() + bias.double()
    backward = grad.double() @ weight.double()
    assert error(layer.run(x), forward) < limit
    assert error(layer.back(grad), backward) < 2 * limit
    plus, more = numbers(num_rows, 24, seed=4), numbers(num_rows, 40, seed=5)
    assert error(layer.run(x, plus), forward + plus) < limit
    assert error(layer.back(grad, more), backward + more) < 2 * limit
    assert layer.run(x, plus).dtype == layer.back(grad, more).dtype == torch.float32
    assert layer.run(x).shape == forward.shape


@pytest.mark.parametrize("precision", NEAR)
def test_a_row_does_not_depend_on_its_neighbours(precision: Precision) -> None:
    """Neither on huge ones; without a scale of its own a small row would be rounded to nothing."""
    layer = make_affine(numbers(16, 32), None, precision)
    x = numbers(40, 32, seed=1)
    loud = x.clone()
    loud[1:] *= 1e6
    alone, among = layer.run(x[:1]), layer.run(loud)[:1]
    torch.testing.assert_close(alone, among, atol=1e-5, rtol=1e-5)
    assert error(among, x[:1].double() @ layer.weight.double().t()) < 3 * NEAR[precision]


def test_int8_gradients_are_right_on_average() -> None:
    """Rounding to the nearest would lose what is below half a step, always to the same side."""
    weight = numbers(2048, 8)
    layer = make_affine(weight, None, "int8")
    grad = torch.full((1, 2048), 0.3 / 127)
    grad[0, 0] = 1.0
    wanted = grad.double() @ weight.double()
    found = [layer.back(grad, None, some_keys(1, seed)) for seed in range(3000)]
    mean = torch.stack(found).double().mean(0)
    assert error(mean, wanted) < 0.02
    nearest = torch.zeros_like(grad)
    nearest[0, 0] = 1.0
    assert error(nearest.double() @ weight.double(), wanted) > 0.05, "else this shows nothing"


def test_int8_rounds_neighbouring_rows_differently() -> None:
    layer = make_affine(numbers(64, 48), None, "int8")
    grads = (numbers(1, 64, seed=2) * 0.01).repeat(200, 1)
    found = layer.back(grads, None, some_keys(200))
    assert len(torch.unique(found, dim=0)) > 150


@pytest.mark.parametrize("precision", NEAR)
def test_what_is_not_finite_stays_so(precision: Precision) -> None:
    layer = make_affine(numbers(8, 16), numbers(8), precision)
    x = numbers(3, 16)
    x[1, 2] = torch.nan
    found = layer.run(x)
    assert torch.isnan(found[1]).all()
    assert torch.isfinite(found[[0, 2]]).all()


def test_zero_rows() -> None:
    layer = make_affine(numbers(8, 16), None, "int8")
    assert torch.equal(layer.run(torch.zeros(3, 16)), torch.zeros(3, 8))
    zeros = torch.zeros(3, 8)
    assert torch.equal(layer.back(zeros, None, some_keys(3)), torch.zeros(3, 16))


def test_int8_gradients_go_with_the_key_and_not_with_the_place() -> None:
    layer, keys = make_affine(numbers(64, 48), None, "int8"), some_keys(700)
    grads, order = numbers(700, 64, seed=3), torch.randperm(700)
    found = layer.back(grads, None, keys)
    assert torch.equal(layer.back(grads[order], None, keys[order]), found[order])
    assert not torch.equal(layer.back(grads, None, keys + 1), found)


def test_the_best_precision_is_one_that_the_processor_is_made_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for has_amx, has_kernels, wanted in (
        (True, False, "bf16"),
        (False, True, "bf16"),
        (False, False, "fp32"),
    ):
        monkeypatch.setattr(affine, "processor", lambda has_amx=has_amx: {"amx_bf16": has_amx})
        monkeypatch.setattr(affine, "can_multiply", lambda name, has=has_kernels: has)
        assert choose_precision("auto", "cpu") == wanted


def test_old_versions_know_nothing_of_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    native.kernels.cache_clear()
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert choose_precision("auto", "cpu") == "fp32"
    native.kernels.cache_clear()


def test_int8_is_for_cpus() -> None:
    with pytest.raises(RecipeError, match="not on cuda"):
        choose_precision("int8", "cuda")

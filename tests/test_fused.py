"""The kernels for AVX-512: equal to PyTorch, each row by itself, whole or not there.

Shape letters: M rows, P packed tokens, H hidden.
"""

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pastina.engine import native
from pastina.engine.affine import Precision, make_affine
from pastina.engine.families import freeze_layers
from pastina.engine.fused import FusedLayer, Linear, Product, can_fuse
from pastina.engine.packing import Pack, pack
from pastina.engine.postnorm import PostNormLayer
from tests.models import bert, some_keys

NEAR: dict[Precision, float] = {"fp32": 1e-6, "bf16": 1e-2, "int8": 2e-2}
PRECISIONS = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            not native.can_multiply(name),
            reason=f"the kernels cannot multiply in {name} here: {native.why_not() or 'processor'}",
        ),
    )
    for name in NEAR
]
fp32 = pytest.mark.skipif(native.kernels() is None, reason=str(native.why_not()))


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


# ---------------------------------------------------------------------------------------------------
# Products


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("num_rows", [0, 1, 5, 6, 7, 48, 97, 200])
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (3, 65), (40, 24), (64, 64), (1100, 130)])
def test_products(num_rows: int, inputs: int, outputs: int, precision: Precision) -> None:
    weight, bias = numbers(outputs, inputs), numbers(outputs, seed=1)
    x, plus = numbers(num_rows, inputs, seed=2), numbers(num_rows, outputs, seed=3)
    product = Product(weight, bias, precision)
    wanted = x.double() @ weight.double().t() + bias.double()
    found, more = product.run(x), product.run(x, plus)
    assert found.shape == wanted.shape
    if num_rows:
        assert error(found, wanted) < NEAR[precision]
        assert error(more, wanted + plus) < NEAR[precision]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_row_is_the_same_bits_in_any_company(precision: Precision) -> None:
    product = Product(numbers(70, 90), numbers(70, seed=1), precision)
    x = numbers(130, 90, seed=2)
    among = product.run(x)
    loud = x.clone()
    loud[::2] *= 1e6
    for row in (1, 47, 49, 129):
        assert torch.equal(product.run(x[row : row + 1])[0], among[row])
        assert torch.equal(product.run(loud)[row], among[row])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_so(bad: float, precision: Precision) -> None:
    x = numbers(9, 16)
    x[4, 2] = bad
    found = Product(numbers(8, 16), numbers(8), precision).run(x)
    assert not torch.isfinite(found[4]).any()
    assert torch.isfinite(found[[0, 1, 2, 3, 5, 6, 7, 8]]).all()


@pytest.mark.skipif(not native.can_multiply("int8"), reason="no int8 here")
def test_rounding_at_random_is_right_on_average_and_the_same_again() -> None:
    weight = numbers(8, 2048)
    product = Product(weight, None, "int8")
    grad = torch.full((200, 2048), 0.3 / 127)
    grad[:, 0] = 1.0
    wanted = grad[:1].double() @ weight.double().t()
    found = torch.cat(
        [product.run(grad, keys_M=some_keys(200, seed)) for seed in range(15)]
    ).double()
    assert error(found.mean(0, keepdim=True), wanted) < 0.02
    assert error(product.run(grad[:1]).double(), wanted) > 0.05, "else this shows nothing"
    assert len(torch.unique(found, dim=0)) > 2900, "each row has its own numbers"
    keys, order = some_keys(200), torch.randperm(200)
    again = product.run(grad[order], keys_M=keys[order])
    assert torch.equal(again, product.run(grad, keys_M=keys)[order]), "wherever a row stands"


@pytest.mark.skipif(not native.can_multiply("int8"), reason="no int8 here")
def test_int8_is_that_of_pytorch() -> None:
    weight, x = numbers(72, 100), numbers(50, 100, seed=1)
    torch.testing.assert_close(
        Product(weight, None, "int8").run(x), make_affine(weight, None, "int8").run(x)
    )


@fp32
def test_weights_that_are_views_and_rows_that_are_not_in_one_piece() -> None:
    weight, x = numbers(50, 70), numbers(30, 20, seed=1).t()
    found = Linear(weight[:, 20:50], None, "fp32").back.run(numbers(4, 50, seed=2))
    assert error(found, numbers(4, 50, seed=2).double() @ weight[:, 20:50].double()) < 1e-6
    assert (
        error(
            Product(weight[:, :30], None, "fp32").run(x), x.double() @ weight[:, :30].t().double()
        )
        < 1e-6
    )


@fp32
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_number_of_threads_changes_nothing(threads: int) -> None:
    layer, packed = make_layers("fp32")[0], make_pack([5, 50, 17])
    before, hidden = torch.get_num_threads(), numbers(packed.num_tokens, 32)
    wanted = layer.run(hidden, packed, None, False, False)[0]
    torch.set_num_threads(threads)
    try:
        assert torch.equal(layer.run(hidden, packed, None, False, False)[0], wanted)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("threads", [2, 3, 7])
def test_threads_share_rows_and_leave_none_out(threads: int, precision: Precision) -> None:
    product = Product(numbers(70, 40), numbers(70, seed=1), precision)
    x, before = numbers(700, 40, seed=2), torch.get_num_threads()
    wanted = product.run(x)
    torch.set_num_threads(threads)
    try:
        for num_rows in (0, 1, 6, 13, 41, 96, 97, 193, 290, 577, 700):
            assert torch.equal(product.run(x[:num_rows]), wanted[:num_rows])
    finally:
        torch.set_num_threads(before)


# ---------------------------------------------------------------------------------------------------
# Layers


def make_pack(lengths: list[int]) -> Pack:
    is_real = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    return pack(is_real, 4)


def make_layers(precision: Precision, **sizes: Any) -> tuple[Any, Any]:
    """The same layer by the kernels and by PyTorch."""
    from transformers import BertModel

    torch.manual_seed(1)
    settings = {
        **bert().to_dict(),
        "num_hidden_layers": 1,
        "hidden_size": 32,
        "intermediate_size": 72,
    }
    settings |= {"num_attention_heads": 4, "attn_implementation": "eager", **sizes}
    backbone = BertModel(type(bert())(**settings)).requires_grad_(False)
    for parameter in backbone.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.2)
    (fused,) = freeze_layers(backbone, precision)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pastina.engine.families.can_fuse", lambda *about: False)
        (plain,) = freeze_layers(backbone, precision)
    assert isinstance(fused, FusedLayer)
    assert isinstance(plain, PostNormLayer)
    return fused, plain


LENGTHS = [[1], [7], [16, 16], [17, 3, 1], [49, 48, 47, 2], [130, 64, 33, 33, 5]]


@fp32
@pytest.mark.parametrize("read", ["all", "first", "some"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("sizes", [{}, {"num_attention_heads": 1}, {"hidden_size": 72}], ids=str)
def test_layers(sizes: dict[str, int], lengths: list[int], read: str) -> None:
    """Forward and back, for every token, the first of each row, and some of them."""
    packed = make_pack(lengths)
    fused, plain = make_layers("fp32", **sizes)
    hidden = numbers(packed.num_tokens, sizes.get("hidden_size", 32))
    read_N = {"all": None, "first": packed.start_B, "some": torch.arange(packed.num_tokens)[::3]}[
        read
    ]
    how = (packed, read_N, read == "first")
    only_R = packed.start_B if read == "all" else None
    found = []
    for layer in (fused, plain):
        out, saved = layer.run(hidden.clone(), *how, True)
        answer, nothing = layer.run(hidden.clone(), *how, False)
        torch.testing.assert_close(answer, out)
        assert nothing is None
        grad = numbers(*out.shape, seed=9)
        found.append((out, layer.back(grad, saved, *how, None, None)))
        out, saved = layer.run(hidden.clone(), *how, True)
        found[-1] += (layer.back(grad, saved, *how, only_R, None),)
    for mine, wanted in zip(*found, strict=True):
        torch.testing.assert_close(mine, wanted, atol=2e-5, rtol=1e-4)


@fp32
def test_huge_scores() -> None:
    """One key takes all; nothing overflows."""
    packed = make_pack([20, 9])
    fused, plain = make_layers("fp32")
    hidden = 300 * numbers(packed.num_tokens, 32)
    found = []
    for layer in (fused, plain):
        out, saved = layer.run(hidden.clone(), packed, None, False, True)
        found.append(
            (out, layer.back(torch.ones_like(out), saved, packed, None, False, None, None))
        )
    assert all(torch.isfinite(part).all() for part in found[0])
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-3, rtol=1e-3)


@fp32
@pytest.mark.parametrize("name", ["gelu", "gelu_new", "relu"])
def test_activations_everywhere(name: str) -> None:
    """Value and slope from far below zero to far above it, by a layer that does little else."""
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([-80.0, 80.0, -1e4, 1e4, 0.0])])
    fused, _ = make_layers("fp32", hidden_act=name, hidden_size=32, intermediate_size=32)
    acts: dict[str, Any] = {"gelu_new": lambda t: F.gelu(t, approximate="tanh"), "relu": F.relu}
    act = acts.get(name, F.gelu)
    eye = torch.eye(32)
    fused.up, fused.down = Linear(eye, None, "fp32"), Linear(eye, None, "fp32")
    fused.out = Linear(torch.zeros(32, 32), None, "fp32")
    one, zero = torch.ones(32), torch.zeros(32)
    for value in x[::97].tolist() + x[-5:].tolist():
        # a norm of weight 0 gives its bias: what reaches the activation is exactly that
        first = fused._norms[0]._replace(weight=zero, bias=torch.full((32,), value))
        fused._norms = (first, fused._norms[1]._replace(weight=one, bias=zero))
        fused.__dict__.pop("_for_answers", None)
        rows = fused._rows(torch.zeros(1, 32), torch.zeros(1, 32), True)[1]
        assert rows is not None
        at = torch.full((32,), value, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(act(at).sum(), at)
        torch.testing.assert_close(rows.slope_NI[0].double(), slope, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_text_does_not_depend_on_the_others(precision: Precision) -> None:
    """To the same bits: products, attention and norms of a row know nothing of the rest."""
    if not can_fuse(precision, torch.device("cpu"), "gelu"):
        pytest.skip(f"PyTorch is faster in {precision} on this processor")
    lengths = [50, 31, 31, 8, 2]
    packed, alone = make_pack(lengths), make_pack([31])
    fused, _ = make_layers(precision)
    hidden = numbers(packed.num_tokens, 32)
    among = fused.run(hidden, packed, None, False, False)[0][50:81]
    assert torch.equal(fused.run(hidden[50:81], alone, None, False, False)[0], among)


@fp32
def test_a_bad_text_hurts_no_other() -> None:
    packed = make_pack([12, 9, 4])
    fused, _ = make_layers("fp32")
    hidden = numbers(25, 32)
    hidden[12:21] = torch.nan
    found = fused.run(hidden, packed, None, False, False)[0]
    assert torch.isnan(found[12:21]).all()
    assert torch.isfinite(found[:12]).all()
    assert torch.isfinite(found[21:]).all()


# ---------------------------------------------------------------------------------------------------
# Where they come from


@pytest.fixture
def _fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """As on a machine that has not made them yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "_FLAGS", (*native._FLAGS, "-O0"))  # soon done; nothing is run
    forget()
    yield
    forget()


def forget() -> None:
    """As in a process that has not asked for them yet."""
    native.kernels.cache_clear()
    native._why_not_made.cache_clear()


@fp32
@pytest.mark.usefixtures("_fresh")
def test_they_are_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.kernels() is not None
    (file,) = (tmp_path / "pastina").iterdir()
    made = file.stat().st_mtime_ns
    forget()
    monkeypatch.setenv("CXX", "no-such-compiler")  # is not asked for any more
    assert native.kernels() is not None
    assert file.stat().st_mtime_ns == made


@fp32
@pytest.mark.usefixtures("_fresh")
@pytest.mark.parametrize(
    ("compiler", "said"), [("no-such-compiler", "no C++ compiler"), ("false", "did not compile")]
)
def test_without_a_compiler(
    compiler: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("CXX", compiler)
    with caplog.at_level(logging.INFO, "pastina"):
        assert native.kernels() is None
        assert not can_fuse("fp32", torch.device("cpu"), "gelu")
    assert said in caplog.text
    assert not list(tmp_path.rglob("*.so"))


@fp32
@pytest.mark.usefixtures("_fresh")
def test_several_may_make_them_at_the_same_time(tmp_path: Path) -> None:
    compiler = native._compiler()
    assert compiler is not None
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: native._compile(compiler, native._library_file()), range(2)))
    assert [path.suffix for path in (tmp_path / "pastina").iterdir()] == [".so"]
    assert native.kernels() is not None


@fp32
@pytest.mark.usefixtures("_fresh")
def test_a_broken_library_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = native._library_file()
    file.parent.mkdir()
    file.write_bytes(b"not a library")
    with caplog.at_level(logging.INFO, "pastina"):
        assert native.kernels() is None
    assert "kernels for AVX-512 are not used" in caplog.text


def test_they_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PASTINA_NATIVE", "0")
    assert native.why_not() == "PASTINA_NATIVE is 0"


@fp32
@pytest.mark.usefixtures("_fresh")
def test_their_state_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.state() == "not compiled yet: at their first use"
    assert native.kernels() is not None
    assert native.state().startswith("ready: ")
    monkeypatch.setenv("PASTINA_NATIVE", "0")
    assert native.state() == "not used: PASTINA_NATIVE is 0"


def test_other_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert native.why_not() == "the processor has no avx512_f"
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # as in old versions
    assert native.why_not() == "the processor has no avx512_f"


def test_what_they_cannot_do() -> None:
    assert not can_fuse("fp32", torch.device("cpu"), "silu")
    assert not can_fuse("fp32", torch.device("meta"), "gelu")


@pytest.mark.skipif(not native.has_tiles(), reason="the processor has no AMX")
def test_without_amx_int8_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = numbers(130, 1100), numbers(200, 1100, seed=1)
    keys = some_keys(200)

    def run() -> tuple[Tensor, Tensor, Tensor]:
        whole = Product(weight, None, "int8")
        return whole.run(x), whole.run(x, keys_M=keys), Product(weight, None, "bf16").run(x)

    with_tiles = run()
    forget()
    with monkeypatch.context() as patched:
        patched.setattr(native, "has_tiles", lambda: False)
        assert "-mamx-tile" not in native._flags()
        without = run()
    forget()
    assert torch.equal(with_tiles[0], without[0])
    assert torch.equal(with_tiles[1], without[1])
    torch.testing.assert_close(with_tiles[2], without[2], rtol=1e-4, atol=1e-3)


@pytest.mark.skipif(not native.has_tiles(), reason="the processor has no AMX")
@pytest.mark.parametrize(("inputs", "most"), [(32, 3.0), (384, 0.8), (1536, 0.8)])
def test_with_amx_fp32_is_as_exact_as_without(
    inputs: int, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the numbers of a row are of very different sizes; of few inputs both err by 1e-7."""
    weight, x = numbers(130, inputs), numbers(100, inputs, seed=1)
    x = x * torch.logspace(-6, 6, inputs)[numbers(inputs, seed=2).argsort()]
    wanted = x.double() @ weight.double().t()
    in_parts = Product(weight, None, "fp32").run(x)
    forget()
    with monkeypatch.context() as patched:
        patched.setattr(native, "has_tiles", lambda: False)
        plain = Product(weight, None, "fp32").run(x)
    forget()
    assert not torch.equal(in_parts, plain), "else the same products were compared"
    sizes = x.double().abs() @ weight.double().abs().t()
    for found in (in_parts, plain):
        assert float(((found - wanted).abs() / sizes).max()) < 1e-6
    assert error(in_parts, wanted) < most * error(plain, wanted)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_products_of_pytorch_in_between_change_nothing(precision: Precision) -> None:
    """Both may use AMX, whose settings belong to the thread."""
    weight, x = numbers(72, 128), numbers(70, 128, seed=1)
    ours, theirs = Product(weight, None, precision), make_affine(weight, None, precision)
    first = ours.run(x), theirs.run(x)
    for num_rows in (1, 17, 70):
        ours.run(x[:num_rows])
        assert torch.equal(theirs.run(x), first[1])
        theirs.run(x[:num_rows])
        assert torch.equal(ours.run(x), first[0])


def test_amx_that_the_system_withholds(monkeypatch: pytest.MonkeyPatch) -> None:
    able = dict.fromkeys(("amx_tile", "amx_int8", "amx_bf16"), True)
    monkeypatch.setattr(native, "processor", lambda: able)
    monkeypatch.setattr(native, "_may_use_tiles", lambda: False)
    assert not native.has_tiles()
    monkeypatch.setattr(native, "_may_use_tiles", lambda: True)
    assert native.has_tiles()
    able["amx_int8"] = False
    assert not native.has_tiles()

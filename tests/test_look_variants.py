"""The variants of PASTA in a look: each against transformers' own forward and plain loops."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import pastina
from pastina.looking.look import look
from pastina.looking.records import Look, Vectors
from pastina.looking.summary import COLUMNS, columns, summary
from pastina.looking.trace import Tracer
from tests import models
from tests.adapter_folder import family_folder, make_adapter
from tests.look_variants import EVERY, TEXTS, VARIANTS, Reference, Variant, option, special


@dataclass
class Case:
    variant: Variant
    found: Look
    reference: Reference
    adapter: Path


@pytest.fixture(scope="module", params=VARIANTS)
def case(
    request: pytest.FixtureRequest, bert: Path, tmp_path_factory: pytest.TempPathFactory
) -> Case:
    variant = VARIANTS[request.param]
    folder = tmp_path_factory.mktemp("variant") / "a"
    adapter = make_adapter(bert, folder, "classify", variant.options, is_pair=True, max_length=40)
    return Case(variant, look(adapter, TEXTS), Reference(bert, adapter, variant), adapter)


def vectors_of(found: Look) -> Vectors:
    assert found.vectors is not None
    return found.vectors


def test_attention_and_outputs_are_those_of_hooks(case: Case) -> None:
    for text, pair in zip(case.found.texts, TEXTS, strict=True):
        sides = case.reference.run(pair)
        assert text.maps is not None
        for side, maps in zip(sides, (text.maps.before_LHTT, text.maps.after_LHTT), strict=True):
            torch.testing.assert_close(maps, side[0], atol=1e-5, rtol=1e-4)
        before, after = (side[1] for side in sides)
        relative_LHT = (after - before).norm(dim=-1) / before.norm(dim=-1)
        torch.testing.assert_close(text.change.first_LH, relative_LHT[..., 0], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(text.change.mean_LH, relative_LHT.mean(-1), rtol=1e-3, atol=1e-4)
        assert text.change.mean_LH.max() > 0.01


def test_slots_and_shares(case: Case) -> None:
    found = case.found
    assert found.slots == case.variant.slots
    ordinary = [name for name in found.slots if name.startswith("ordinary")]
    assert found.num_special == len(found.slots) - len(ordinary)
    for text, pair in zip(found.texts, TEXTS, strict=True):
        attention_LHTT = case.reference.run(pair)[1][0]
        ids = case.reference.ids
        places = special(ids)
        if ordinary:  # those that got a vector, from the left
            places += sorted({place for place, _ in case.variant.owners(0, ids)})
        assert [text.slots.index(slot + 1) for slot in range(len(places))] == places
        share_LHS = attention_LHTT.mean(2)[..., places]
        torch.testing.assert_close(text.after.share_LHS, share_LHS, atol=1e-5, rtol=1e-4)
        largest_LHT = attention_LHTT.argmax(-1)
        on_special_LHT = torch.isin(largest_LHT, torch.tensor(special(ids)))
        expected_LH = 10 * on_special_LHT.sum(-1) >= 9 * len(ids)
        assert torch.equal(text.after.vertical_all_LH > 0, expected_LH)
    total = found.after.share_LHS[..., : found.num_special].sum(-1)
    torch.testing.assert_close(found.on_special(found.after), total)


def test_learned_numbers(case: Case) -> None:
    vectors, variant = vectors_of(case.found), case.variant
    assert vectors.layers == (0, 1)
    assert vectors.names == variant.names
    assert vectors.everywhere == variant.options.everywhere
    for layer, tables in enumerate(case.reference.tables):
        rows = variant.rows.get(layer, list(range(len(variant.names))))
        states, moved, lengths = states_by_loops(case, layer)
        for column, row in enumerate(rows):
            at = (layer, column)
            if row is None:
                assert math.isnan(vectors.norm_LV[at])
                assert math.isnan(vectors.ratio_LV[at])
                continue
            own = tables["pasta_vectors"][row]
            assert float(vectors.norm_LV[at]) == pytest.approx(float(own.norm()), rel=1e-5)
            norms = [float(state.norm()) for state in states[row]]
            mean_norm = sum(norms) / len(norms)
            assert float(vectors.state_norm_LV[at]) == pytest.approx(mean_norm, rel=1e-4)
            ratio = float(own.norm()) / mean_norm
            assert float(vectors.ratio_LV[at]) == pytest.approx(ratio, rel=1e-4)
            cosine = torch.cosine_similarity(own, torch.stack(states[row]).mean(0), dim=0)
            assert float(vectors.state_cosine_LV[at]) == pytest.approx(float(cosine), abs=1e-4)
            for other, other_row in enumerate(rows):
                if other_row is None:
                    assert math.isnan(vectors.slot_cosine_LVV[layer, column, other])
                    continue
                cosine = torch.cosine_similarity(own, tables["pasta_vectors"][other_row], dim=0)
                assert float(vectors.slot_cosine_LVV[layer, column, other]) == pytest.approx(
                    float(cosine), abs=1e-5
                )
            if vectors.scale_norm_LV is not None and vectors.scale_ratio_LV is not None:
                scale = tables["pasta_scales"][row]
                assert float(vectors.scale_norm_LV[at]) == pytest.approx(float(scale.norm()))
                added = sum(float((state * scale).norm()) for state in states[row])
                ratio = added / sum(norms)
                assert float(vectors.scale_ratio_LV[at]) == pytest.approx(ratio, rel=1e-4)
        if vectors.product_norm_L is not None and vectors.product_ratio_L is not None:
            matrix = tables["pasta_downs"] @ tables["pasta_ups"]
            size = math.sqrt(sum(float(x) ** 2 for x in matrix.flatten()))
            assert float(vectors.product_norm_L[layer]) == pytest.approx(size, rel=1e-4)
            assert float(vectors.product_ratio_L[layer]) == pytest.approx(moved / lengths, rel=1e-4)
    assert (vectors.scale_norm_LV is not None) == variant.options.scale
    assert (vectors.product_norm_L is not None) == (variant.options.rank > 0)


def states_by_loops(case: Case, layer: int) -> tuple[dict[int, list[Tensor]], float, float]:
    """The states that each vector is added to; over all tokens the length of the product, and theirs."""
    states: dict[int, list[Tensor]] = {}
    moved = lengths = 0.0
    tables = case.reference.tables[layer]
    for pair in TEXTS:
        state_TD = case.reference.run(pair)[1][2][layer]
        for place, vector in case.variant.owners(layer, case.reference.ids):
            states.setdefault(vector, []).append(state_TD[place])
        for state_D in state_TD if "pasta_downs" in tables else ():
            moved += float((state_D @ tables["pasta_downs"] @ tables["pasta_ups"]).norm())
            lengths += float(state_D.norm())
    return states, moved, lengths


def test_the_same_tokens_as_a_prediction(case: Case) -> None:
    extra = case.variant.options.extra_tokens
    assert case.found.extra_tokens == extra
    predictor = pastina.load(case.adapter)
    assert predictor.extra_tokens == extra
    for text, pair in zip(case.found.texts, TEXTS, strict=True):
        case.reference.run(pair)
        assert len(text.tokens) == len(case.reference.ids)
        added = tuple(f"[SEP]+{number + 1}" for number in range(extra))
        assert text.tokens[len(text.tokens) - extra :] == added


def test_json_and_the_table(case: Case) -> None:
    found = case.found
    values = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert values["vectors"]["names"] == list(case.variant.names)
    assert values["num_special"] == found.num_special
    assert columns(found) == (*COLUMNS, *case.variant.columns)
    rows = list(summary(found))
    assert {len(row) for row in rows} == {len(columns(found))}
    share = 100 * float(found.on_special(found.after).mean())
    assert rows[-1][3].endswith(f"→ {share:.1f} %")
    vectors, cells = vectors_of(found), dict(zip(columns(found), rows[1], strict=True))
    last = len(vectors.names) - vectors.everywhere
    own = [x for x in vectors.ratio_LV[1, :last].tolist() if not math.isnan(x)]
    assert cells["vectors"] == f"{sum(own) / len(own):.2f} ×"
    if vectors.everywhere:
        assert cells[EVERY] == f"{float(vectors.ratio_LV[1, -1]):.2f} ×"
    if vectors.scale_ratio_LV is not None:
        assert cells["scale of every token"] == f"{float(vectors.scale_ratio_LV[1, -1]):.2f} ×"
    if vectors.product_ratio_L is not None:
        assert cells["product"] == f"{float(vectors.product_ratio_L[1]):.2f} ×"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "What is added to each special token at the input of each layer."),
        ({"slots": "first"}, "each special token that has a vector at the input"),
        ({"everywhere": True}, "each special token, and to every token (one more vector), at"),
        ({"positions": "first"}, "the first ordinary tokens, in the place of special ones"),
        ({"at": "keys-values"}, "each special token at what keys and values read of each layer"),
        ({"scale": True}, "scaled as well"),
        ({"rank": 3}, "a product of itself, of rank 3"),
        ({"bias_layers": (1,)}, "The biases of products and norms in the layers 1 (from 0) change"),
    ],
)
def test_it_says_what_is_added(
    settings: dict[str, Any], words: str, bert: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(bert, tmp_path / "a", "classify", option(**settings))
    assert words in vectors_of(look(adapter, ["a plum now"])).about


def test_fewer_layers_and_layers_without_vectors(bert: Path, tmp_path: Path) -> None:
    options = option(everywhere=True, scale=True, rank=2)
    low = make_adapter(bert, tmp_path / "low", "classify", options, num_layers=1)
    found = look(low, ["we need a plum"])
    assert (found.num_layers, vectors_of(found).layers) == (1, (0,))
    upper = make_adapter(bert, tmp_path / "upper", "classify", option(layers=(1,), everywhere=True))
    found = look(upper, ["we need a plum"])
    assert vectors_of(found).layers == (1,)
    assert next(summary(found))[-1] == "–"
    assert found.change.mean_LH[0].max() == 0


def test_too_few_ordinary_tokens(bert: Path, tmp_path: Path) -> None:
    adapter = make_adapter(bert, tmp_path / "a", "classify", option(positions="first"))
    found = look(adapter, ["plum"])
    assert found.slots == ("1 [CLS]", "2 [SEP]", "ordinary 1")
    vectors = vectors_of(found)
    assert vectors.names == ("ordinary 1", "ordinary 2 (in no text)")
    assert torch.isnan(vectors.ratio_LV[:, 1]).all()
    assert not torch.isnan(vectors.ratio_LV[:, 0]).any()


def test_a_layer_that_is_called_several_times(tmp_path: Path) -> None:
    folder = family_folder("albert", tmp_path / "albert")
    options = option(everywhere=True, scale=True, rank=2, share="by_token")
    adapter = make_adapter(folder, tmp_path / "a", "classify", options)
    vectors = vectors_of(look(adapter, ["we need a plum"]))
    assert vectors.layers == (0, 1, 2)
    tensors = {
        name.rpartition(".")[2]: tensor
        for name, tensor in load_file(adapter / "adapter_model.safetensors").items()
    }
    torch.testing.assert_close(vectors.norm_LV, tensors["pasta_vectors"].norm(dim=-1))
    torch.testing.assert_close(vectors.scale_norm_LV, tensors["pasta_scales"].norm(dim=-1))
    products = torch.linalg.matrix_norm(tensors["pasta_downs"] @ tensors["pasta_ups"])
    torch.testing.assert_close(vectors.product_norm_L, products)


@pytest.mark.parametrize("name", ["bert", "albert"])
def test_biases(name: str, bert: Path, tmp_path: Path) -> None:
    folder = bert if name == "bert" else family_folder(name, tmp_path / name)
    chosen = (1,) if name == "bert" else (0, 2)
    adapter = make_adapter(folder, tmp_path / "a", "classify", option(bias_layers=chosen))
    found = look(adapter, ["we need a plum"])
    vectors = vectors_of(found)
    assert vectors.bias_norm_L is not None
    assert vectors.bias_ratio_L is not None
    (own,) = [
        tensor.view(len(chosen), -1)
        for name, tensor in load_file(adapter / "adapter_model.safetensors").items()
        if "pasta_biases" in name
    ]
    for layer, norm in enumerate(vectors.bias_norm_L.tolist()):
        if layer not in chosen:
            assert math.isnan(norm)
            continue
        assert norm == pytest.approx(float(own[chosen.index(layer)].norm()), rel=1e-5)
    assert set(vectors.bias_ratio_L.isnan().tolist()) == {True, False}
    shown = [row[-1] for row in summary(found)][: len(vectors.layers)]
    assert [text != "–" for text in shown] == [layer in chosen for layer in vectors.layers]
    plain = make_adapter(folder, tmp_path / "b", "classify", option())
    assert vectors_of(look(plain, ["we need a plum"])).bias_norm_L is None


def test_a_tagger_with_windows(bert: Path, tmp_path: Path) -> None:
    options = VARIANTS["pasta-tagger"].options
    adapter = make_adapter(bert, tmp_path / "tags", "tag", options)
    found = look(adapter, ["we need a plum and nail " * 12])
    assert found.num_texts > 1
    assert vectors_of(found).names == ("[CLS]", "[SEP]", "every token")


def test_what_keys_and_values_read_behind_a_norm() -> None:
    model = models.build("t5")
    ids = torch.tensor([[5, 6, 7, 1]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    given = Tracer(model, model).run(inputs).state_LTD
    read = Tracer(model, model, inside=True).run(inputs).state_LTD
    for index, block in enumerate(model.encoder.block):  # type: ignore[union-attr]
        with torch.no_grad():
            torch.testing.assert_close(read[index], block.layer[0].layer_norm(given[index]))

"""The numbers of a look against transformers' own attention and plain loops, on trained adapters."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

import pastina
from pastina.backbones import load_backbone
from pastina.errors import AdapterError, BackboneError, DataError
from pastina.looking.look import look
from pastina.looking.measure import measure_heads
from pastina.looking.places import token_label
from pastina.looking.records import Look
from pastina.looking.summary import columns, summary
from pastina.looking.trace import Tracer
from pastina.recipe import BackboneSpec, FullOptions, LinearOptions, PastaOptions
from pastina.training.fit import train
from tests import models
from tests.adapter_folder import LONG, family_folder, make_adapter, reseal
from tests.backbone_folder import toy_recipe

TEXT = ("we need the plum today", "please send me a hammer now")
TEXTS = [TEXT, ("thanks", "a fig")]


@pytest.fixture(scope="module")
def trained(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PASTA adapter for pairs, trained."""
    folder = tmp_path_factory.mktemp("trained")
    return train(toy_recipe(bert, folder, "pair"), folder / "run").adapter


@pytest.fixture(scope="module")
def seen(trained: Path) -> Look:
    return look(trained, TEXTS)


class Plain:
    """transformers' own forward of the backbone, with vectors from the file added by hooks."""

    def __init__(self, folder: Path, vectors: Sequence[Tensor] | None) -> None:
        self.model: Any = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        for index, layer in enumerate(self.model.encoder.layer):
            own = None if vectors is None else vectors[index]
            layer.register_forward_pre_hook(self.hook(own), with_kwargs=True)

    def hook(self, vectors_SD: Tensor | None) -> Any:
        def add(module: Any, args: Any, kwargs: Any) -> Any:
            hidden_BTD = args[0].clone()
            self.given.append(args[0][0])
            for slot, place in enumerate(self.places):
                hidden_BTD[0, place] += 0 if vectors_SD is None else vectors_SD[slot]
            self.taken.append(hidden_BTD[0])
            return (hidden_BTD, *args[1:]), kwargs

        return add

    @torch.no_grad()
    def run(self, texts: tuple[str, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Attention (L, H, T, T), outputs of the heads (L, H, T, E), inputs of the layers (L, T, D)."""
        inputs = self.tokenizer(*texts, return_tensors="pt")
        ids = inputs["input_ids"][0].tolist()
        special = [self.tokenizer.cls_token_id, self.tokenizer.sep_token_id]
        self.places = [place for place, token in enumerate(ids) if token in special]
        self.given: list[Tensor] = []  # what a layer is given, and with the vectors added
        self.taken: list[Tensor] = []
        output = self.model(**inputs, output_attentions=True)
        attention_LHTT = torch.stack(output.attentions)[:, 0]
        outputs = []
        for index, layer in enumerate(self.model.encoder.layer):
            value_TD = layer.attention.self.value(self.taken[index])
            value_HTE = value_TD.unflatten(-1, (attention_LHTT.shape[1], -1)).transpose(0, 1)
            outputs.append(attention_LHTT[index] @ value_HTE)
        return attention_LHTT, torch.stack(outputs), torch.stack(self.given)


def vectors_in(adapter: Path) -> list[Tensor]:
    tensors = load_file(adapter / "adapter_model.safetensors")
    return [tensors[name] for name in sorted(tensors) if "pasta_vectors" in name]


@pytest.fixture(scope="module")
def sides(bert: Path, trained: Path) -> tuple[Plain, Plain]:
    return Plain(bert, None), Plain(bert, vectors_in(trained))


def test_maps_are_those_of_transformers(seen: Look, sides: tuple[Plain, Plain]) -> None:
    for text, pair in zip(seen.texts, TEXTS, strict=True):
        assert text.maps is not None
        for side, maps in zip(sides, (text.maps.before_LHTT, text.maps.after_LHTT), strict=True):
            torch.testing.assert_close(maps, side.run(pair)[0], atol=1e-6, rtol=1e-5)
        moved = (text.maps.after_LHTT - text.maps.before_LHTT).abs().amax((1, 2, 3))
        assert (moved > 1e-3).all(), "the trained vectors reach the first layer already"
    assert seen.texts[0].tokens[:2] == ("[CLS]", "we")
    assert [s for s in seen.texts[0].slots if s] == [1, 2, 3]
    assert seen.slots == ("1 [CLS]", "2 [SEP]", "3 [SEP]")


def test_shares_and_vertical_heads_by_plain_loops(seen: Look, sides: tuple[Plain, Plain]) -> None:
    for text, pair in zip(seen.texts, TEXTS, strict=True):
        for side, heads in zip(sides, (text.before, text.after), strict=True):
            attention_LHTT = side.run(pair)[0].tolist()
            for layer, maps in enumerate(attention_LHTT):
                for head, rows in enumerate(maps):
                    for slot, place in enumerate(side.places):
                        share = sum(row[place] for row in rows) / len(rows)
                        assert float(heads.share_LHS[layer, head, slot]) == pytest.approx(
                            share, abs=1e-6
                        )
                    largest = [row.index(max(row)) for row in rows]
                    ends = sum(place in (0, len(rows) - 1) for place in largest)
                    special = sum(place in side.places for place in largest)
                    found = (heads.vertical_LH[layer, head], heads.vertical_all_LH[layer, head])
                    assert [bool(x) for x in found] == [
                        10 * n >= 9 * len(rows) for n in (ends, special)
                    ]


def test_both_criteria_say_yes_and_no() -> None:
    slots = [1, 0, 0, 0, 2, 0, 0, 0, 0, 3]

    def head(*columns: int) -> Tensor:
        """Row i looks at columns[i % n] most."""
        weights_TT = torch.full((10, 10), 0.05)
        for row in range(10):
            weights_TT[row, columns[row % len(columns)]] = 0.55
        return weights_TT

    maps = torch.stack([head(0), head(9, 0), head(4), head(0, 4, 9), head(6), head(0, 6)])
    nine, eight = head(0), head(0)
    nine[3], eight[3], eight[5] = maps[4][0], maps[4][0], maps[4][0]
    heads = measure_heads(torch.cat([maps, torch.stack([nine, eight])])[None], slots, 3)
    assert heads.vertical_LH[0].tolist() == [1, 1, 0, 0, 0, 0, 1, 0]
    assert heads.vertical_all_LH[0].tolist() == [1, 1, 1, 1, 0, 0, 1, 0]
    assert heads.share_LHS[0, 1].tolist() == pytest.approx([0.3, 0.05, 0.3])


def test_outputs_of_heads(seen: Look, sides: tuple[Plain, Plain]) -> None:
    for text, pair in zip(seen.texts, TEXTS, strict=True):
        before, after = (side.run(pair)[1] for side in sides)
        relative_LHT = (after - before).norm(dim=-1) / before.norm(dim=-1)
        torch.testing.assert_close(text.change.first_LH, relative_LHT[..., 0], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(text.change.mean_LH, relative_LHT.mean(-1), rtol=1e-3, atol=1e-5)


def cosine(one: Tensor, other: Tensor) -> float:
    dot = sum(a * b for a, b in zip(one.tolist(), other.tolist(), strict=True))
    return dot / (math.hypot(*one.tolist()) * math.hypot(*other.tolist()))


def test_vectors(seen: Look, trained: Path, sides: tuple[Plain, Plain]) -> None:
    vectors = seen.vectors
    assert vectors is not None
    assert vectors.layers == (0, 1)
    assert vectors.names == seen.slots
    table = vectors_in(trained)
    states: list[Tensor] = []  # (L, S, D) of each text
    for pair in TEXTS:
        states_LTD = sides[1].run(pair)[2]
        states.append(states_LTD[:, sides[1].places])
    mean_LSD = torch.stack(states).mean(0)
    for layer in range(2):
        for slot in range(3):
            own = table[layer][slot]
            lengths = [float(one[layer, slot].norm()) for one in states]
            norm, state_norm = float(own.norm()), sum(lengths) / len(lengths)
            at = (layer, slot)
            assert float(vectors.norm_LV[at]) == pytest.approx(norm, rel=1e-5)
            assert float(vectors.state_norm_LV[at]) == pytest.approx(state_norm, rel=1e-5)
            assert float(vectors.ratio_LV[at]) == pytest.approx(norm / state_norm, rel=1e-5)
            assert float(vectors.state_cosine_LV[at]) == pytest.approx(
                cosine(own, mean_LSD[at]), abs=1e-5
            )
            for other in range(3):
                assert float(vectors.slot_cosine_LVV[layer, slot, other]) == pytest.approx(
                    cosine(own, table[layer][other]), abs=1e-5
                )
            for other in range(2):
                assert float(vectors.layer_cosine_VLL[slot, layer, other]) == pytest.approx(
                    cosine(own, table[other][slot]), abs=1e-5
                )


def test_many_texts_are_means(seen: Look, trained: Path) -> None:
    ones = [look(trained, [text]) for text in TEXTS]
    assert (seen.num_texts, ones[0].num_texts) == (2, 1)
    for part, names in (
        ("before", ("share_LHS", "vertical_LH", "vertical_all_LH")),
        ("after", ("share_LHS", "vertical_LH", "vertical_all_LH")),
        ("change", ("first_LH", "mean_LH")),
    ):
        for name in names:
            first, second = (getattr(getattr(one, part), name) for one in ones)
            torch.testing.assert_close(getattr(getattr(seen, part), name), (first + second) / 2)
    assert len(look(trained, TEXTS, maps=1).texts) == 1
    assert look(trained, TEXTS, maps=0).texts == ()


def test_zero_vectors_change_nothing(bert: Path, tmp_path: Path) -> None:
    adapter = make_adapter(bert, tmp_path / "zero", "classify")
    path = adapter / "adapter_model.safetensors"
    tensors = {
        name: torch.zeros_like(t) if "pasta_vectors" in name else t
        for name, t in load_file(path).items()
    }
    save_file(tensors, path, metadata={"format": "pt"})
    found = look(reseal(adapter), ["we need a plum"])
    maps = found.texts[0].maps
    assert maps is not None
    assert torch.equal(maps.before_LHTT, maps.after_LHTT)
    assert found.change.first_LH.abs().max() == found.change.mean_LH.abs().max() == 0
    assert found.vectors is not None
    assert found.vectors.norm_LV.max() == 0


SETTINGS = {
    "all": (PastaOptions(share="all"), ("all slots",), (0, 1)),
    "by_token": (PastaOptions(share="by_token"), ("[CLS]", "[SEP]"), (0, 1)),
    "one layer": (PastaOptions(layers=(1,)), ("1 [CLS]", "2 [SEP]", "3 [SEP]"), (1,)),
    "more slots": (
        PastaOptions(num_slots=4),
        ("1 [CLS]", "2 [SEP]", "3 [SEP]", "4 (in no text)"),
        (0, 1),
    ),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_who_owns_a_vector(setting: str, bert: Path, tmp_path: Path) -> None:
    options, names, layers = SETTINGS[setting]
    adapter = make_adapter(bert, tmp_path / "a", "classify", options, is_pair=True)
    found = look(adapter, TEXTS)
    vectors = found.vectors
    assert vectors is not None
    assert (vectors.names, vectors.layers) == (names, layers)
    tables = torch.stack(vectors_in(adapter))
    torch.testing.assert_close(vectors.norm_LV, tables.norm(dim=-1))
    # a vector that several places share stands beside the states of all of them
    plain = Plain(bert, None)
    lengths = []
    for pair in TEXTS:
        state_TD = plain.run(pair)[2][0]
        lengths.append([float(state_TD[place].norm()) for place in plain.places])
    if layers[0] == 0:  # what the first layer is given does not depend on the vectors
        expected = {
            "all": [sum(map(sum, lengths)) / 6],
            "by_token": [
                sum(one[0] for one in lengths) / 2,
                sum(one[1] + one[2] for one in lengths) / 4,
            ],
            "more slots": [*(sum(one[s] for one in lengths) / 2 for s in range(3)), math.nan],
        }[setting]
        assert vectors.state_norm_LV[0].tolist() == pytest.approx(expected, rel=1e-5, nan_ok=True)
    values = json.loads(json.dumps(found.as_dict(), allow_nan=False))["vectors"]
    assert (None in values["state_norm_LV"][0]) == (setting == "more slots")


def test_full_fine_tuning_against_the_old_weights(bert: Path, tmp_path: Path) -> None:
    recipe = toy_recipe(bert, tmp_path, "classify", method=FullOptions(), fit={"epochs": 1})
    found = look(train(recipe, tmp_path / "run").folder, ["we need the plum today"])
    maps = found.texts[0].maps
    assert found.vectors is None
    assert maps is not None
    expected = Plain(bert, None).run(("we need the plum today",))[0]
    torch.testing.assert_close(maps.before_LHTT, expected, atol=1e-6, rtol=1e-5)
    assert (maps.after_LHTT - maps.before_LHTT).abs().max() > 1e-4


# the layer that makes the values of all heads, and which third of what it puts out they are
VALUES = {
    "bert": ("attention.self.value", None),
    "roberta": ("attention.self.value", None),
    "electra": ("attention.self.value", None),
    "distilbert": ("attention.v_lin", None),
    "modernbert": ("attn.Wqkv", 2),
    "mpnet": ("attention.attn.v", None),
    "albert": ("albert_layers.0.attention.value", None),
    "deberta": ("attention.self.value_proj", None),
}


@pytest.mark.parametrize("family", VALUES)
def test_every_family(family: str, tmp_path: Path) -> None:
    folder = family_folder(family, tmp_path / family)
    adapter = make_adapter(folder, tmp_path / "adapter", "classify", is_pair=True)
    found = look(adapter, TEXTS)
    text = found.texts[0]
    assert text.maps is not None
    for maps in (text.maps.before_LHTT, text.maps.after_LHTT):
        torch.testing.assert_close(maps.sum(-1), torch.ones(maps.shape[:-1]))
    assert found.vectors is not None
    assert len(found.vectors.layers) == found.num_layers
    assert (found.change.first_LH > 0).all()
    assert text.tokens[1] == "we"
    # the kept outputs are attention times values, head by head
    backbone = load_backbone(BackboneSpec(name=str(folder)), keep_pooler=False)
    name, third = VALUES[family]
    values: list[Tensor] = []
    for module_name, module in backbone.model.named_modules():
        if f".{module_name}".endswith(f".{name}"):
            module.register_forward_hook(lambda m, a, out: values.append(out[0]))
    inputs = dict(backbone.tokenizer(*TEXT, return_tensors="pt"))
    trace = Tracer(backbone.model, backbone.model).run(inputs)
    assert len(values) == found.num_layers
    for attention_HTT, output_THE, value in zip(
        trace.attention_LHTT, trace.output_LTHE, values, strict=True
    ):
        value_TD = value if third is None else value.chunk(3, -1)[third]
        value_HTE = value_TD.unflatten(-1, output_THE.shape[1:]).transpose(0, 1)
        torch.testing.assert_close(
            (attention_HTT @ value_HTE).transpose(0, 1), output_THE, atol=1e-5, rtol=1e-4
        )


def test_taggers_see_windows(bert: Path, tmp_path: Path) -> None:
    adapter = make_adapter(bert, tmp_path / "tags", "tag")
    found = look(adapter, [LONG, "a plum"])
    assert [text.name for text in found.texts] == [
        "text 1, window 1",
        "text 1, window 2",
        "text 2",
    ] or [text.name for text in found.texts] == ["text 1", "text 2"]
    assert all(len(text.tokens) <= 24 for text in found.texts)
    long = look(adapter, [f"{LONG} {LONG}"])
    assert [text.name for text in long.texts][:2] == ["text 1, window 1", "text 1, window 2"]


def test_long_texts_are_cut_as_for_a_prediction(bert: Path, tmp_path: Path) -> None:
    adapter = make_adapter(bert, tmp_path / "a", "classify", max_length=8)
    found = look(adapter, [LONG])
    assert (len(found.texts[0].tokens), found.texts[0].truncated) == (8, True)
    assert pastina.load(adapter).predict([LONG])[0].truncated


def test_what_is_refused(bert: Path, tmp_path: Path, trained: Path) -> None:
    single = make_adapter(bert, tmp_path / "a", "classify")
    for texts, message in (
        ("a plum", r"look takes a list of texts, not str"),
        ([], "no text to look at"),
        (["a plum", " "], "text 2: the text is empty"),
        ([3], "text 1: 3 is neither"),
        ([("a", "b")], "reads single texts, and this is a pair"),
        (["a [SEP] b"], "3 special tokens but 2 slots"),
    ):
        with pytest.raises(DataError, match=message):
            look(single, texts)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="reads pairs of texts"):
        look(trained, ["a plum"])
    with pytest.raises(DataError, match="seen -1"):
        look(single, ["a plum"], maps=-1)
    linear = make_adapter(bert, tmp_path / "linear", "classify", LinearOptions())
    with pytest.raises(AdapterError, match="linear probe: it leaves the backbone as it is"):
        look(linear, ["a plum"])
    with pytest.raises(AdapterError, match="is not an adapter"):
        look(tmp_path / "nothing", ["a plum"])


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # PEFT's use of it
@pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig])
def test_methods_that_add_tokens_are_refused(config: Any, bert: Path) -> None:
    backbone = AutoModel.from_pretrained(bert).eval()
    model = get_peft_model(backbone, config(task_type="FEATURE_EXTRACTION", num_virtual_tokens=3))
    ids = AutoTokenizer.from_pretrained(bert)("a plum", return_tensors="pt")["input_ids"]
    with pytest.raises(BackboneError, match="adds tokens of its own"):
        Tracer(model, backbone).run({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def test_an_unknown_architecture_is_refused(bert: Path) -> None:
    backbone = AutoModel.from_pretrained(bert).eval()
    for layer in backbone.encoder.layer:
        layer.attention.output.add_module("mixing", layer.attention.output.dense)
        del layer.attention.output.dense
    with pytest.raises(BackboneError, match="does not know this architecture"):
        Tracer(backbone, backbone)


def test_tokens_as_people_read_them(backbones: Callable[[str], Path]) -> None:
    for name, text, expected in (
        ("bert", "plum xy", ["[CLS]", "plum", "x", "##y", "[SEP]"]),
        ("roberta", " plum", ["<s>", "plum", "</s>"]),
        ("roberta", "é  a", ["<s>", "Ã", "©", "␣", "a", "</s>"]),
    ):
        tokenizer = AutoTokenizer.from_pretrained(backbones(name))
        labels = [token_label(tokenizer, token) for token in tokenizer(text)["input_ids"]]
        assert labels == expected


def test_the_table(seen: Look) -> None:
    rows = list(summary(seen))
    assert [row[0] for row in rows] == ["1", "2", "all"]
    assert {len(row) for row in rows} == {len(columns(seen))}
    assert seen.vectors is not None
    assert rows[1][-1] == f"{float(seen.vectors.ratio_LV[1].mean()):.2f} ×"
    assert columns(seen)[-1] == "vectors"
    was, now = (float(s.vertical_LH.sum()) for s in (seen.before, seen.after))
    assert rows[-1][1] == f"{was:g} → {now:g}"
    share = 100 * float(seen.after.share_LHS[0].sum(-1).mean())
    assert rows[0][3].endswith(f"→ {share:.1f} %")


def test_public_names(trained: Path) -> None:
    found = pastina.look(trained, [TEXT])
    assert isinstance(found, pastina.Look)
    assert callable(pastina.look), "no module of this name may hide the function"


def test_the_encoder_of_an_encoder_decoder() -> None:
    model = models.build("t5")
    ids = torch.tensor([[5, 6, 7, 1]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    trace = Tracer(model, model).run(inputs)
    values = [block.layer[0].SelfAttention.v for block in model.encoder.block]  # type: ignore[union-attr]
    norms = [block.layer[0].layer_norm for block in model.encoder.block]  # type: ignore[union-attr]
    for index, (value, norm) in enumerate(zip(values, norms, strict=True)):
        with torch.no_grad():
            value_TD = value(norm(trace.state_LTD[index]))
        value_HTE = value_TD.unflatten(-1, trace.output_LTHE.shape[2:]).transpose(0, 1)
        expected = (trace.attention_LHTT[index] @ value_HTE).transpose(0, 1)
        torch.testing.assert_close(trace.output_LTHE[index], expected, atol=1e-5, rtol=1e-4)

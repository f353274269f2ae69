"""`pastina bench speed` on a tiny backbone and toy rows: all of it runs; how fast is not looked at."""

import doctest
import importlib.util
import json
import math
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel

from pastina.adapter import load_adapter
from pastina.bench import curves, fleets, mixing, speed, timing, training
from pastina.bench.copies import write_copies
from pastina.bench.picture import STYLES
from pastina.bench.speed import Begin, End, Event, Tick, measure_speed
from pastina.bench.work import FULL, QUICK, SETS, Work
from pastina.errors import DataError, PastinaError
from tests import backbone_folder, processes
from tests.backbone_folder import save_backbone, toy_rows, write_rows

# of PEFT and transformers, which are measured as they are
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
TINY = replace(
    QUICK,
    rounds=1,
    batch=8,
    train_rows=60,
    texts=10,
    mixed_tasks=3,
    resident_tasks=4,
    gemm_rows=32,
    fleet_rows=16,
)
KEYS = {
    **{
        f"train_{name}": tuple(
            f"train_{name}_{precision}{suffix}"
            for suffix in ("", "_mean")
            for precision in ("fp32", "int8", "bf16")
        )
        for name in ("clinc150", "qnli")
    },
    "train_floor": ("train_floor_share_qnli",),
    "predict": ("predict_clinc150_fp32", "predict_clinc150_bf16", "predict_clinc150_int8"),
    "mixed": ("batch_64_tasks",),
    "resident": (
        "resident_1000_time",
        "resident_1000_mb",
        "load_1000_s",
        "load_last_vs_first",
    ),
    "fleet": ("fleet_16_cpu", "fleet_16_gpu"),
    "curves": (),
}
SMALL = ("train_floor", "predict", "mixed")  # groups that take less than a second


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data/ and a backbone that reads as many tokens as the recipes want."""
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backbone_folder._SIZES, "max_position_embeddings", 130)
        save_backbone("bert", folder / "bert")
    for name, files in SETS.items():
        (folder / "data" / name).mkdir(parents=True)
        for seed, file in enumerate(files.values()):
            rows = toy_rows("pair" if name == "qnli" else "classify", 80, seed)
            write_rows(folder / "data" / name / file, rows)
    return folder


@pytest.fixture
def measure(place: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    monkeypatch.setattr(speed, "QUICK", TINY)

    def run(**options: Any) -> dict[str, Any]:
        own = {"is_quick": True, "data": place / "data", "backbone": str(place / "bert")}
        return measure_speed(**(own | options))

    return run


def test_every_figure(
    measure: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = mixing._in_process  # once is enough: it imports everything anew
    seen: list[dict[str, float]] = []
    monkeypatch.setattr(
        mixing,
        "_in_process",
        lambda orders: seen[-1] if seen else seen.append(look(orders)) or seen[0],
    )
    path, events = tmp_path / "speed.json", list[Event]()
    result = measure(
        json_file=path,
        picture=tmp_path / "costs.png",
        command="pastina bench speed",
        on_event=events.append,
    )
    assert json.loads(path.read_text()) == result
    assert [event.group for event in events if isinstance(event, End)] == list(KEYS)
    assert {key for keys in KEYS.values() for key in keys} == set(speed.figures(result))
    for key, figure in speed.figures(result).items():
        if key == "fleet_16_gpu" and not torch.cuda.is_available():
            assert figure is None
            assert "no CUDA device" in result["notes"][key]
            continue
        assert figure is not None
        assert math.isfinite(figure)
        assert figure > 0 or key == "resident_1000_mb"
        raw = [n for n in result["repetitions"][key].values() if isinstance(n, list)]
        assert {len(numbers) for numbers in raw} <= {QUICK.repetitions, 3 * QUICK.repetitions}
        assert result["repetitions"][key]["unit"]
    assert {"machine", "versions", "backbone", "data", "size", "command"} <= set(result)
    assert result["size"]["is_quick"] is True
    ticks = [event for event in events if isinstance(event, Tick)]
    for group in KEYS:
        own = [tick for tick in ticks if tick.group == group]
        assert [tick.done for tick in own] == list(range(1, own[0].total + 1)), group
    check_picture(result, tmp_path)


def check_picture(result: dict[str, Any], folder: Path) -> None:
    assert (folder / "costs.png").read_bytes().startswith(b"\x89PNG")
    root = ET.parse(folder / "costs.svg").getroot()
    texts = " ".join("".join(e.itertext()) for e in root.iter() if e.tag.endswith(("text", "desc")))
    for words in ("milliseconds", "tokens in a row", "pastina, training step", "Tasks in memory"):
        assert words in texts
    for name, curve in result["curves"].items():
        assert set(curve["seconds"]) <= set(STYLES)
        assert all(len(n) == len(curve["x"]) for n in curve["seconds"].values()), name


def test_stopped_and_begun_again(
    measure: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "GROUPS", {g: speed.GROUPS[g] for g in SMALL})
    path, events = tmp_path / "speed.json", list[Event]()

    def stop(event: Event) -> None:
        if isinstance(event, Tick) and event.group == "predict":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(json_file=path, on_event=stop)
    first = json.loads(path.read_text())
    assert list(first["groups"]) == ["train_floor"]
    assert first["train_floor_share_qnli"] > 0

    result = measure(json_file=path, on_event=events.append)
    assert [e.group for e in events if isinstance(e, Begin) and e.is_kept] == ["train_floor"]
    assert result["groups"]["train_floor"] == first["groups"]["train_floor"]
    assert list(speed.figures(result)) == [key for group in SMALL for key in KEYS[group]]

    again = measure(json_file=path, only=["mixed"])
    assert again["repetitions"]["batch_64_tasks"] != result["repetitions"]["batch_64_tasks"]
    assert again["predict_clinc150_fp32"] == result["predict_clinc150_fp32"]

    monkeypatch.setattr(speed, "code_digest", lambda: "other code")
    events.clear()
    with pytest.raises(KeyboardInterrupt):
        measure(json_file=path, on_event=lambda event: (events.append(event), stop(event)))
    assert not any(event.is_kept for event in events if isinstance(event, Begin))
    monkeypatch.setattr(speed, "QUICK", replace(TINY, repetitions=3))
    with pytest.raises(PastinaError, match="holds measurements with other size"):
        measure(json_file=path, only=["mixed"])


def test_a_run_that_takes_the_signal(
    measure: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(work: Work) -> Any:
        raise speed.Stopped("Go on with: pastina train --resume --out runs/gone")

    monkeypatch.setitem(speed.GROUPS, "fleet", stopped)
    with pytest.raises(KeyboardInterrupt):
        measure(only=["fleet"])


def test_what_cannot_be_measured(
    measure: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match=r"nowhere/clinc150/train.jsonl.*--data FOLDER"):
        measure(data=tmp_path / "nowhere")
    with pytest.raises(PastinaError, match=r"no group 'tain'. The groups are train_clinc150, "):
        measure(only=["tain"])
    with pytest.raises(PastinaError, match="no curves to draw"):
        measure(only=["mixed"], picture=tmp_path / "costs.png")
    for text in ("{", "[]", "{}", '{"machine": 1}'):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(PastinaError, match=r"other.json is not a result"):
            measure(json_file=tmp_path / "other.json")
    with pytest.raises(DataError, match=r"has 60 rows, and 24000 are needed"):
        training.draw_rows(60, replace(TINY, steps=2999), 0)
    monkeypatch.setattr("sys.executable", "false")
    with pytest.raises(PastinaError, match="loads many tasks failed: without a word"):
        mixing._in_process({})
    assert speed._chosen(["train"]) == ["train_clinc150", "train_qnli", "train_floor"]
    assert speed._chosen([]) == list(KEYS)


def test_a_member_of_the_fleet_that_fails(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Work(TINY, str(place / "bert"), place / "data", tmp_path, lambda total: None)
    monkeypatch.setattr(fleets, "train", lambda recipe, out: None)
    monkeypatch.setattr(fleets, "train_fleet", lambda *_: [PastinaError("no such luck")])
    with pytest.raises(PastinaError, match="no such luck"):
        fleets.measure_fleet(work)


def test_copies_are_adapters(place: Path, tmp_path: Path) -> None:
    work = Work(TINY, str(place / "bert"), place / "data", tmp_path, lambda total: None)
    folders = write_copies(work.adapter, tmp_path / "copies", 11)
    cards = [load_adapter(folder).card for folder in (folders[0], folders[8], folders[10])]
    assert [len(card.labels) for card in cards] == [2, 10, 3]
    assert [card.name for card in cards] == ["task0", "task8", "task10"]
    assert len({card.digest for card in cards}) == 3
    assert cards[0].pooling == "cls"


def test_floor() -> None:
    for module in (timing, training):
        assert doctest.testmod(module).failed == 0
    model = BertModel(
        BertConfig(
            vocab_size=8,
            hidden_size=4,
            num_hidden_layers=2,
            num_attention_heads=1,
            intermediate_size=8,
        )
    )
    # rows of 3 and 5 tokens
    rows = [curves.Example(0, [1] * length, None, 0, None, None, False) for length in (3, 5)]
    products = 2 * 2 * (4 * 16 + 2 * 32) * 8
    attention = 4 * 4 * 2 * (9 + 25)
    share = training.floor_forwards(2, 4, 8)
    assert share == pytest.approx((1 + 0.25 + 0 + 0.25 + 1 - 0.375) / 2)
    assert training.floor_flops(model, rows) == pytest.approx(share * (products + attention))
    assert training.gemm_rate(model, 16, torch.float32)() > 0


def test_full_size() -> None:
    assert FULL.repetitions >= 5
    assert (FULL.mixed_tasks, FULL.resident_tasks, FULL.fleet) == (64, 1000, 16)
    assert FULL.fleet_rows == 4000


def test_command_line(place: Path, tmp_path: Path) -> None:
    where = ("--data", str(place / "data"), f"--backbone={place / 'bert'}")
    options = ("--quick", "--only", "mixed", *where, "--json", "speed.json")
    work = tmp_path / "work"
    work.mkdir()
    done = processes.pastina("bench", "speed", *options, folder=work)
    assert done.code == 0, done.err
    result = json.loads((work / "speed.json").read_text())
    assert done.out == f"figure\tvalue\nbatch_64_tasks\t{result['batch_64_tasks']:g}\n"
    assert "mixed" in done.err
    typed = "pastina bench speed --quick --only mixed --data data --backbone=bert --json speed.json"
    assert result["command"] == typed, "no place on this machine"
    lost = processes.pastina("bench", "speed", folder=work)
    assert (lost.code, lost.out) == (1, "")
    assert lost.err.strip().startswith("pastina: There is no ../shared/data/clinc150/train.jsonl")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_script_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(__file__).parents[1] / "scripts" / "gpu_speed.py"
    spec = importlib.util.spec_from_file_location("gpu_speed", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr("sys.argv", ["gpu_speed.py"])
    with pytest.raises(SystemExit, match="No CUDA device was found"):
        module.main()

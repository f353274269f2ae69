"""`pastina bench serve`: its parts work; how fast the server is is not looked at here."""

import json
import signal
import xml.etree.ElementTree as ET
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import pastina
from pastina.adapter import check_content
from pastina.bench import broken, serving
from pastina.bench.attacks import _server_errors, measure_fuzz
from pastina.bench.load import Orders, run_load
from pastina.bench.serve_load import _growth, _load, measure_compare, measure_soak
from pastina.bench.serve_picture import STYLES, draw
from pastina.bench.serving import QUICK, ServeWork, measure_serving
from pastina.bench.work import SETS, Measured
from pastina.errors import AdapterError, DataError, PastinaError
from pastina.files import CARD, CONFIG, WEIGHTS
from pastina.serve.archive import unpack
from tests import backbone_folder, processes
from tests.backbone_folder import save_backbone, toy_rows, write_rows
from tests.serving import Running, files_of

pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])
TINY = replace(
    QUICK,
    repetitions=1,
    tasks=4,
    archives=40,
    examples=1,
    soak_s=4.0,
    seconds=0.5,
    connections=4,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data/ and a backbone that reads as many tokens as the recipe wants."""
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backbone_folder._SIZES, "max_position_embeddings", 130)
        save_backbone("bert", folder / "bert")
    (folder / "data" / "clinc150").mkdir(parents=True)
    for seed, file in enumerate(SETS["clinc150"].values()):
        write_rows(folder / "data" / "clinc150" / file, toy_rows("classify", 80, seed))
    return folder


@pytest.fixture
def work(place: Path, tmp_path: Path) -> ServeWork:
    return ServeWork(TINY, str(place / "bert"), place / "data", tmp_path, lambda total: None)


def test_fuzz(work: ServeWork) -> None:
    measured = measure_fuzz(work)
    assert measured.figures == {"fuzz_5xx": 0, "fuzz_escaped": 0}, measured.repetitions
    raw = measured.repetitions["fuzz_5xx"]
    assert raw["sorts"] == len(broken.SORTS) >= 12
    assert sum(sum(own.values()) for own in raw["archives"].values()) == 40
    for part in raw["schemathesis"].values():
        assert part["is_content"], part["last_lines"]


def test_soak(work: ServeWork) -> None:
    measured = measure_soak(work)
    raw = measured.repetitions["soak_wrong"]
    assert (measured.figures["soak_wrong"], measured.figures["soak_5xx"]) == (0, 0), raw
    assert raw["answers"] > 100
    assert raw["replaced"] >= 2
    assert raw["engine_starts"] == 1
    assert len(measured.repetitions["soak_growth"]["each_second"]) >= 2


@pytest.mark.parametrize(("group", "repetitions"), [("served", 1), ("latency", 2), ("start", 1)])
def test_figures_against_the_engine(work: ServeWork, group: str, repetitions: int) -> None:
    work = replace(work, size=replace(TINY, repetitions=repetitions))
    measured = serving.groups()[group](work)
    assert all(value is not None and value > 0 for value in measured.figures.values())
    for key, raw in measured.repetitions.items():
        numbers = [one for own in raw.values() if isinstance(own, list) for one in own]
        assert len(numbers) >= work.size.repetitions, key
        assert min(numbers) > 0, key


def test_others_answer_too(work: ServeWork) -> None:
    """What is compared with is really asked: nothing is refused, and all of them take memory."""
    size = replace(TINY, peers=(2,))
    curve = measure_compare(replace(work, size=size)).curves["serve"]
    assert set(curve["texts_per_s"]) == set(STYLES)
    for name in STYLES:
        assert curve["texts_per_s"][name][0] > 0, name
        assert curve["mb"][name][0] > 1, name
        assert curve["ready_s"][name][0] > 0.1, name


def test_sigterm_ends_the_server_too(place: Path) -> None:
    args = ["bench", "serve", "--quick", "--only", "soak", "--data", "data", "--backbone", "bert"]
    command = processes.start(args, place)
    bench = psutil.Process(command.pid)

    def serves() -> bool:
        with suppress(psutil.NoSuchProcess):  # others come and go
            children = bench.children(recursive=True)
            return any("pastina.serve.process" in own.cmdline() for own in children)
        return False

    assert command.wait_until(serves), command.err
    begun = bench.children(recursive=True)
    bench.terminate()
    assert command.done().code == 128 + signal.SIGTERM
    assert not psutil.wait_procs(begun, timeout=20)[1]


def test_refusals_are_no_rate(server: Running, work: ServeWork) -> None:
    port = int(server.url.rpartition(":")[2])
    with pytest.raises(PastinaError, match="404"):
        _load(work, port, ["nobody"], 0)


def test_load_counts_wrong_answers(server: Running, bert: Path, folder: Path) -> None:
    tasks = pastina.Tasks(str(bert), precision="fp32")
    task = tasks.add(folder / "acme" / "topics", "acme/topics")
    texts = ["saw", "plum"]
    truth = [
        {task.digest: tasks.predict([("acme/topics", text)])[0].scores or {}} for text in texts
    ]
    path = "/v1/tasks/acme/topics/predict"
    requests = [(path, json.dumps({"inputs": text})) for text in texts]
    port = int(server.url.rpartition(":")[2])
    found = run_load(Orders(port, requests, 3, 0.5, truth=truth))
    assert (found.wrong, set(found.statuses)) == (0, {"200"})
    assert len(found.latencies) == found.num_sent > 10
    assert found.rate == pytest.approx(found.num_sent / 0.5, rel=0.5)
    half = run_load(Orders(port, requests, 3, 1.0, rate=30.0, seed=1, truth=truth))
    assert 10 < half.num_sent < 60
    assert half.wrong == 0
    other = run_load(Orders(port, requests, 2, 0.2, truth=truth[::-1]))
    assert other.wrong == len(other.latencies) > 0
    none = run_load(Orders(port, [("/v1/tasks/nobody/predict", "{}")], 2, 0.2))
    assert set(none.statuses) == {"422"}
    assert none.latencies == []
    with pytest.raises(PastinaError, match="makes load failed"):
        run_load(Orders(1, requests, 1, 0.1))


def test_broken_archives_are_broken(folder: Path, bert: Path) -> None:
    """Each of them is refused, or is the good one with damage where nobody reads."""
    bank = pastina.Tasks(str(bert)).bank
    files = files_of(folder / "acme" / "topics")
    good = check_content(Path("x"), files[CARD], files[WEIGHTS], files[CONFIG]).card.digest
    refused = dict.fromkeys(broken.SORTS, 0)
    for sort, archive in broken.broken_archives(files, 8 * len(broken.SORTS), seed=1):
        try:
            found = unpack(archive, 1_000_000)
            content = check_content(Path("x"), found[CARD], found[WEIGHTS], found[CONFIG])
            bank.check(content, Path("x"))
            assert (sort, content.card.digest) == ("wrong bits", good)
        except AdapterError:
            refused[sort] += 1
    assert all(refused.values()), refused


def test_growth() -> None:
    steady = [100.0 + i % 3 for i in range(600)]
    assert abs(_growth(steady, 600.0)) < 0.02
    assert _growth([100.0 + i for i in range(600)], 600.0) > 3
    assert _growth([100.0, 110.0], 2.0) == pytest.approx(0.1)


def test_errors_of_the_server() -> None:
    text = 'pastina_requests_total{route="/x",status="500"} 2.0\n'
    text += 'pastina_requests_total{route="/readyz",status="503"} 9.0\n'
    text += 'pastina_requests_total{route="/x",status="200"} 7.0\n'
    assert _server_errors(text) == {"500": 2.0}


def test_the_file_is_kept_and_gone_on_with(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_measured = 0

    def measure(work: ServeWork) -> Measured:
        nonlocal num_measured
        num_measured += 1
        work.tick(1)
        return Measured({"start_1000_s": float(num_measured)}, {"start_1000_s": {"unit": "s"}})

    monkeypatch.setattr(serving, "groups", lambda: {"start": measure})
    options: dict[str, Any] = {"data": place / "data", "backbone": str(place / "bert")}
    options["json_file"], options["is_quick"] = tmp_path / "serve.json", True

    def again(**changes: Any) -> dict[str, Any]:
        return measure_serving(**(options | changes))

    first = measure_serving(**options)
    assert json.loads((tmp_path / "serve.json").read_text()) == first
    assert measure_serving(**options)["start_1000_s"] == 1.0, "it was not measured again"
    assert again(only=["start"])["start_1000_s"] == 2.0
    assert {"machine", "versions", "backbone", "data", "size"} <= set(first)
    assert first["groups"]["start"]["threads"] == torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert again(only=["start"])["groups"]["start"]["threads"] == 7, "one file holds both"
    with pytest.raises(PastinaError, match="other size"):
        again(is_quick=False)
    with pytest.raises(PastinaError, match="no group 'x'"):
        again(only=["x"])
    with pytest.raises(DataError, match="--data FOLDER"):
        again(data=tmp_path)
    with pytest.raises(PastinaError, match="nothing to draw"):
        again(picture=tmp_path / "x")


def test_picture(tmp_path: Path) -> None:
    some: Callable[[float], list[float | None]] = lambda y: [y, 2 * y, None]  # noqa: E731
    curve = {
        "x": [1, 10, 100],
        "texts_per_s": {name: some(9.0) for name in STYLES},
        "mb": {name: some(50.0) for name in STYLES},
        "ready_s": {name: some(5.0) for name in STYLES},
    }
    path = draw({"curves": {"serve": curve}}, tmp_path / "serve")
    texts = " ".join("".join(element.itertext()) for element in ET.parse(path).getroot().iter())
    assert all(name in texts for name in STYLES)
    for label in ("texts a second", "memory, MB", "seconds until ready"):
        assert label in texts

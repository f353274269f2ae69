"""`pastina bench serve`: a server under load from another process, kept in one file."""

import gc
import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from pastina.backbones import BackboneFiles, find_backbone
from pastina.bench.copies import CLASSES, write_copies
from pastina.bench.speed import Begin, End, OnEvent, Tick, code_digest
from pastina.bench.work import SETS, Measured
from pastina.data.read import read_rows
from pastina.errors import DataError, PastinaError
from pastina.files import whole_file
from pastina.recipe import DEFAULT_BACKBONE, BackboneSpec, DataSpec, make_recipe
from pastina.training.fit import machine, versions

DATA = Path("../shared/data")


@dataclass(frozen=True, slots=True)
class ServeSize:
    """How much is measured; it stands in the result file.

    repetitions: of each figure. seconds: of one repetition. texts: at most so many different ones.
    rows: of the bare engine's batches. soak_s: of the long run. archives: broken ones that are sent.
    examples: of each route by schemathesis. peers: numbers of tasks at which others are compared, each
    of which gets peer_limit_s to load.
    """

    repetitions: int = 5
    seconds: float = 8.0
    tasks: int = 1000
    connections: int = 64
    texts: int = 512
    rows: int = 64
    soak_s: float = 600.0
    soak_texts: int = 12
    archives: int = 2000
    examples: int = 100
    peers: tuple[int, ...] = (1, 10, 100, 1000)
    peer_limit_s: float = 3600.0


FULL = ServeSize()
QUICK = ServeSize(
    repetitions=2,
    seconds=1.0,
    tasks=20,
    connections=8,
    texts=32,
    rows=16,
    soak_s=6.0,
    soak_texts=4,
    archives=60,
    examples=3,
    peers=(1, 3),
    peer_limit_s=60.0,
)


@dataclass(frozen=True)
class ServeWork:
    """Where a group works. tick: to be called after each piece of work, with all pieces there are."""

    size: ServeSize
    backbone: str
    data: Path
    scratch: Path
    tick: Callable[[int], None]

    @cached_property
    def files(self) -> BackboneFiles:
        """The backbone on this machine."""
        return find_backbone(BackboneSpec(name=self.backbone))

    @cached_property
    def texts(self) -> list[str]:
        """Short texts: of CLINC150's test file; their labels are not looked at."""
        path = self.data / "clinc150" / SETS["clinc150"]["test"]
        rows = read_rows(path, "classify", DataSpec())
        return [row.text for row in rows[: self.size.texts]]

    @cached_property
    def adapter(self) -> Path:
        """An adapter for CLINC150's classes, trained for a moment."""
        from pastina.training.fit import train

        values = {
            "name": "clinc150",
            "kind": "classify",
            "backbone": {"name": self.backbone},
            "data": {
                "train": str(self.data / "clinc150" / SETS["clinc150"]["train"]),
                "limit": 320,
                "dev_share": 0.02,
            },
            "fit": {"epochs": 1},
        }
        return train(make_recipe(values).resolved(), self.scratch / "clinc150").adapter

    def copies(self, name: str, count: int, classes: Sequence[int] = CLASSES) -> Path:
        """A folder with so many tasks, task0, task1 ...; `classes`: how many each has, in turn."""
        folder = self.scratch / name
        write_copies(self.adapter, folder, count, classes)
        return folder


Group = Callable[[ServeWork], Measured]


def groups() -> dict[str, Group]:
    """The groups of figures by name, in their order."""
    from pastina.bench.attacks import measure_fuzz
    from pastina.bench.serve_load import (
        measure_compare,
        measure_latency,
        measure_served,
        measure_soak,
        measure_start,
    )

    return {
        "served": measure_served,
        "latency": measure_latency,
        "start": measure_start,
        "fuzz": measure_fuzz,
        "compare": measure_compare,
        "soak": measure_soak,
    }


def measure_serving(
    *,
    is_quick: bool = False,
    json_file: Path | None = None,
    picture: Path | None = None,
    only: Sequence[str] = (),
    data: Path = DATA,
    backbone: str = DEFAULT_BACKBONE,
    command: str = "",
    on_event: OnEvent = lambda event: None,
) -> dict[str, Any]:
    """The figures by key, with everything that is needed to measure them again.

    The arguments are those of `measure_speed`; of the data only clinc150/ is read.

    Raises:
        DataError: data is missing. PastinaError: no such group; the file holds other measurements.
    """
    known = groups()
    for wanted in only:
        if wanted not in known:
            raise PastinaError(f"There is no group {wanted!r}. The groups are {', '.join(known)}.")
    for file in _data_files(data):
        if not file.is_file():
            raise DataError(f"There is no {file}. Name the folder of clinc150/ with --data FOLDER.")
    code = code_digest()
    with tempfile.TemporaryDirectory(prefix="pastina-bench-") as scratch:
        size = QUICK if is_quick else FULL
        work = ServeWork(size, backbone, data, Path(scratch), lambda total: None)
        result = _begun(json_file, _identity(work, is_quick))
        for group in [name for name in known if not only or name in only]:
            is_kept = not only and result["groups"].get(group, {}).get("code") == code
            on_event(Begin(group, is_kept))
            if is_kept:
                continue
            started = time.monotonic()
            measured = _measure(work, known[group], group, on_event)
            took = time.monotonic() - started
            about = {"command": command, "code": code, "seconds": round(took, 1)}
            about["threads"] = machine()["threads"]
            _enter(result, group, measured, about)
            if json_file is not None:
                _write(result, json_file)
            on_event(End(group, measured.figures, took))
    if picture is not None:
        from pastina.bench.serve_picture import draw

        draw(result, picture)
    return result


def figures(result: Mapping[str, Any]) -> dict[str, float | None]:
    """The figures alone, in the order of the groups."""
    keys = [key for group in groups() for key in result["groups"].get(group, {"keys": []})["keys"]]
    return {key: result[key] for key in keys}


def _measure(work: ServeWork, group: Group, name: str, on_event: OnEvent) -> Measured:
    done = 0

    def tick(total: int) -> None:
        nonlocal done
        done += 1
        on_event(Tick(name, done, total))

    with tempfile.TemporaryDirectory(dir=work.scratch, prefix=f"{name}-") as scratch:
        try:
            return group(ServeWork(work.size, work.backbone, work.data, Path(scratch), tick))
        finally:
            gc.collect()


def _data_files(data: Path) -> list[Path]:
    return [data / "clinc150" / SETS["clinc150"][part] for part in ("train", "test")]


def _identity(work: ServeWork, is_quick: bool) -> dict[str, Any]:
    """What all groups of one file have in common; through JSON, to compare it with a file's."""
    digests = {
        str(path.relative_to(work.data)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in _data_files(work.data)
    }
    # the soak and the fuzz may run on fewer threads than the timings: each group tells its own
    own = {key: value for key, value in machine().items() if key != "threads"}
    identity = {
        "machine": own,
        "versions": versions(),
        "backbone": {"name": work.backbone, "digest": work.files.digest},
        "data": digests,
        "size": {"is_quick": is_quick, **asdict(work.size)},
    }
    return json.loads(json.dumps(identity))


def _begun(path: Path | None, identity: Mapping[str, Any]) -> dict[str, Any]:
    if path is None or not path.exists():
        return {"notes": {}, "curves": {}, "repetitions": {}, "groups": {}, **identity}
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        differing = [name for name in identity if result[name] != identity[name]]
        has_groups = bool(result["groups"])
    except (ValueError, KeyError, TypeError) as error:
        raise PastinaError(
            f"{path} is not a result of these measurements ({error!r}). Name another file."
        ) from None
    if has_groups and differing:
        raise PastinaError(
            f"{path} holds measurements with other {' and '.join(differing)}. Name another file, or "
            "remove it."
        )
    return result


def _enter(
    result: dict[str, Any], group: str, measured: Measured, about: Mapping[str, Any]
) -> None:
    """Put a group's numbers in the place of those that were there."""
    for key in result["groups"].get(group, {"keys": []})["keys"]:
        for part in (result, result["notes"], result["repetitions"]):
            part.pop(key, None)
    result.update(measured.figures)
    result["notes"].update(measured.notes)
    result["repetitions"].update(measured.repetitions)
    result["curves"].update(measured.curves)
    result["groups"][group] = {
        "keys": list(measured.figures),
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        **about,
    }


def _write(result: Mapping[str, Any], path: Path) -> None:
    with whole_file(path) as file:
        json.dump({**figures(result), **result}, file, indent=1)
        file.write("\n")

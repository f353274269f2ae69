"""`pastina bench speed`: what is fast, as ratios measured side by side, kept in one file."""

import gc
import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from pastina.bench.curves import measure_curves
from pastina.bench.fleets import measure_fleet
from pastina.bench.mixing import measure_mixed, measure_resident
from pastina.bench.picture import draw
from pastina.bench.predicting import measure_prediction
from pastina.bench.training import measure_floor, measure_training
from pastina.bench.work import FULL, QUICK, SETS, Measured, Work
from pastina.errors import DataError, PastinaError, need
from pastina.files import whole_file
from pastina.recipe import DEFAULT_BACKBONE
from pastina.training.fit import machine, versions
from pastina.training.loop import Stopped

GROUPS: dict[str, Callable[[Work], Measured]] = {
    "train_clinc150": partial(measure_training, name="clinc150"),
    "train_qnli": partial(measure_training, name="qnli"),
    "train_floor": measure_floor,
    "predict": measure_prediction,
    "mixed": measure_mixed,
    "resident": measure_resident,
    "fleet": measure_fleet,
    "curves": measure_curves,
}
DATA = Path("../shared/data")


@dataclass(frozen=True, slots=True)
class Begin:
    """A group begins. is_kept: it does not, as the file holds it already."""

    group: str
    is_kept: bool


@dataclass(frozen=True, slots=True)
class Tick:
    """So much of a group is done."""

    group: str
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class End:
    """A group is measured, and in the file."""

    group: str
    figures: dict[str, float | None]
    seconds: float


Event = Begin | Tick | End
OnEvent = Callable[[Event], None]


def measure_speed(
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

    Args:
        is_quick: fewer and smaller repetitions: whether it works, not how fast it is.
        json_file: written after each group. What it holds of the same code is not measured again.
        picture: of the curves, as .png and .svg.
        only: groups to measure, whether the file holds them or not.
        data: the folder with clinc150/ and qnli/.
        backbone: name or folder.
        command: how a person asked for this; it goes into the file.
        on_event: hears how far it is.

    Raises:
        DataError: data is missing. PastinaError: no such group; the file holds other measurements.
    """
    groups, code = _chosen(only), code_digest()
    check_data(data)
    if picture is not None:
        need("matplotlib", "bench")
    with tempfile.TemporaryDirectory(prefix="pastina-bench-") as scratch:
        size = QUICK if is_quick else FULL
        work = Work(size, backbone, data, Path(scratch), tick=lambda total: None)
        result = _begun(json_file, _identity(work))
        if picture is not None and "curves" not in (*groups, *result["groups"]):
            raise PastinaError("There are no curves to draw. Measure them as well: --only curves")
        for group in groups:
            is_kept = not only and result["groups"].get(group, {}).get("code") == code
            on_event(Begin(group, is_kept))
            if is_kept:
                continue
            started = time.monotonic()
            measured = _measure(work, group, on_event)
            took = time.monotonic() - started
            about = {"command": command, "code": code, "seconds": round(took, 1)}
            _enter(result, group, measured, about)
            if json_file is not None:
                _write(result, json_file)
            on_event(End(group, measured.figures, took))
    if picture is not None:
        draw(result, picture)
    return result


def check_data(data: Path) -> None:
    """Nothing, if the sets are there.

    Raises:
        DataError: a file is missing.
    """
    for path in _data_files(data):
        if not path.is_file():
            raise DataError(
                f"There is no {path}. The measurements read the sets {' and '.join(SETS)}; name the "
                "folder that holds them with --data FOLDER."
            )


def code_digest() -> str:
    """SHA-256 over the source of this package: other code, other figures."""
    digest = hashlib.sha256()
    folder = Path(__file__).parents[1]
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest()


def _chosen(only: Sequence[str]) -> list[str]:
    """The groups of these names; `train` is all groups that begin so."""
    for wanted in only:
        if not any(_is_meant(group, wanted) for group in GROUPS):
            raise PastinaError(f"There is no group {wanted!r}. The groups are {', '.join(GROUPS)}.")
    return [g for g in GROUPS if not only or any(_is_meant(g, wanted) for wanted in only)]


def _is_meant(group: str, wanted: str) -> bool:
    return group == wanted or group.startswith(f"{wanted}_")


def _measure(work: Work, group: str, on_event: OnEvent) -> Measured:
    done = 0

    def tick(total: int) -> None:
        nonlocal done
        done += 1
        on_event(Tick(group, done, total))

    with tempfile.TemporaryDirectory(dir=work.scratch, prefix=f"{group}-") as scratch:
        try:
            return GROUPS[group](replace(work, tick=tick, scratch=Path(scratch)))
        except Stopped:  # a run that was training for us took the Ctrl-C
            raise KeyboardInterrupt from None
        finally:
            gc.collect()


# ---------------------------------------------------------------------------------------------------
# The file


def _identity(work: Work) -> dict[str, Any]:
    """What all groups of one file have in common; through JSON, to compare it with a file's."""
    digests = {
        str(path.relative_to(work.data)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in _data_files(work.data)
    }
    identity = {
        "machine": machine(),
        "versions": versions(),
        "backbone": {"name": work.backbone, "digest": work.files.digest},
        "data": digests,
        "size": {"is_quick": work.size is QUICK, **asdict(work.size)},
    }
    return json.loads(json.dumps(identity))


def _data_files(data: Path) -> list[Path]:
    return [data / name / file for name, files in SETS.items() for file in files.values()]


def _begun(path: Path | None, identity: Mapping[str, Any]) -> dict[str, Any]:
    """The result so far: what the file holds, or nothing yet."""
    if path is None or not path.exists():
        return {"notes": {}, "curves": {}, "repetitions": {}, "groups": {}, **identity}
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        differing = [name for name in identity if result[name] != identity[name]]
        groups = result["groups"]
    except (ValueError, KeyError, TypeError) as error:
        raise PastinaError(
            f"{path} is not a result of these measurements ({error!r}). Name another file."
        ) from None
    if groups and differing:
        raise PastinaError(
            f"{path} holds measurements with other {' and '.join(differing)}. Name another file, or "
            "remove it."
        )
    return result


def _enter(
    result: dict[str, Any], group: str, measured: Measured, about: Mapping[str, Any]
) -> None:
    """Put a group's numbers in the place of those that were there."""
    before = result["groups"].get(group, {"keys": []})
    for key in before["keys"]:
        for part in (result, result["notes"], result["repetitions"]):
            part.pop(key, None)
    result.update(measured.figures)
    result["notes"].update(measured.notes)
    result["repetitions"].update(measured.repetitions)
    result["curves"].update(measured.curves)
    result["command"] = about["command"]
    result["groups"][group] = {
        "keys": list({**measured.figures, **measured.repetitions}),
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        **about,
    }


def figures(result: Mapping[str, Any]) -> dict[str, float | None]:
    """The figures alone, in the order of the groups."""
    keys = [key for group in GROUPS for key in result["groups"].get(group, {"keys": []})["keys"]]
    return {key: result[key] for key in keys if key in result}


def _write(result: Mapping[str, Any], path: Path) -> None:
    ordered = {**figures(result), **result}
    with whole_file(path) as file:
        json.dump(ordered, file, indent=1)
        file.write("\n")

"""Data sets of the Hugging Face hub, the GLUE tasks by name, and local data set folders."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pastina.data.columns import Columns, find_columns
from pastina.data.convert import to_row
from pastina.data.rows import Row
from pastina.data.tables import Record
from pastina.errors import DataError, PastinaWarning, need
from pastina.recipe import DataSpec

GLUE = "nyu-mll/glue"
# task -> text columns; the label column is always called label
GLUE_TEXTS: dict[str, tuple[str, ...]] = {
    "cola": ("sentence",),
    "sst2": ("sentence",),
    "mrpc": ("sentence1", "sentence2"),
    "qqp": ("question1", "question2"),
    "stsb": ("sentence1", "sentence2"),
    "mnli": ("premise", "hypothesis"),
    "qnli": ("question", "sentence"),
    "rte": ("sentence1", "sentence2"),
    "wnli": ("sentence1", "sentence2"),
}
SPLITS = {
    "train": ("train",),
    "dev": ("validation", "validation_matched", "dev", "valid", "val"),
    "test": ("test", "test_matched"),
}

Decoder = Callable[[Any], Any]


def read_hub(kind: str, spec: DataSpec) -> tuple[list[Row], list[Row], list[Row]]:
    """Training, dev and test rows of a data set; a part that does not exist is empty.

    With `hub`, the options train, dev and test name splits (found by their usual names where left
    out). Numbered classes become their names. Rows without a label (-1 in the test parts of GLUE)
    or without a text are left out with a warning.
    """
    spec, splits, name = _load(spec)
    wanted = {"train": spec.train, "dev": spec.dev, "test": spec.test}
    train, dev, test = (
        _read_part(splits, part, wanted[part], name, kind, spec)
        for part in ("train", "dev", "test")
    )
    if not train:
        raise DataError(f"{name}: no labelled training rows. Its splits are {', '.join(splits)}.")
    return train, dev, test


def glue_task(hub: str, config: str | None) -> str | None:
    """The GLUE task that `glue/rte`, or `nyu-mll/glue` with the config `rte`, names."""
    home, _, task = hub.rpartition("/")
    if hub in ("glue", GLUE):
        task = config or ""
    elif home not in ("glue", GLUE):
        return None
    if task not in GLUE_TEXTS:
        raise DataError(f"There is no GLUE task {task!r}. The tasks are {', '.join(GLUE_TEXTS)}.")
    return task


def _load(spec: DataSpec) -> tuple[DataSpec, Mapping[str, Any], str]:
    """The recipe with the columns filled in, the splits by name, and a name for messages."""
    assert spec.hub is not None
    datasets = need("datasets", "train")
    folder = Path(spec.folder) / spec.hub
    if folder.is_dir():
        return spec, _load_folder(datasets, folder, spec.config), str(folder)
    task = glue_task(spec.hub, spec.config)
    if task is None:
        return spec, _call(datasets, spec.hub, spec.config), spec.hub
    return glue_columns(spec, task), _call(datasets, GLUE, task), f"glue/{task}"


def glue_columns(spec: DataSpec, task: str) -> DataSpec:
    """The recipe with the columns of a GLUE task where it names none."""
    text, pair = (*GLUE_TEXTS[task], None)[:2]
    columns = {} if spec.text or spec.text_pair else {"text": text, "text_pair": pair}
    return spec.model_copy(update={**columns, "label": spec.label or "label"})


def _load_folder(datasets: Any, folder: Path, config: str | None) -> Mapping[str, Any]:
    if (folder / "dataset_dict.json").is_file():
        return datasets.load_from_disk(str(folder))
    if (folder / "state.json").is_file():
        return {"train": datasets.load_from_disk(str(folder))}
    return _call(datasets, str(folder), config)


def _call(datasets: Any, name: str, config: str | None) -> Mapping[str, Any]:
    try:
        return datasets.load_dataset(name, config)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
        raise DataError(
            f"The data set {name!r} (config {config!r}) cannot be loaded: {reason}. Check the "
            "name, data.config and the network; HF_HUB_OFFLINE=1 reads only what is in the cache."
        ) from error


def _read_part(
    splits: Mapping[str, Any], part: str, wanted: str | None, name: str, kind: str, spec: DataSpec
) -> list[Row]:
    if wanted is not None and wanted not in splits:
        raise DataError(
            f"{name}: there is no split {wanted!r} (data.{part}); its splits are "
            f"{', '.join(splits)}."
        )
    split = wanted or next((s for s in SPLITS[part] if s in splits), None)
    if split is None:
        return []
    table = splits[split]
    where = f"{name}, split {split}"
    columns = find_columns(table.column_names, kind, spec, where)
    records = list(_records(table, columns, where))
    usable = _usable(records, columns, where, hidden=part == "test")
    return [to_row(record, columns, kind, spec.align) for record in usable]


def _usable(records: list[Record], columns: Columns, where: str, *, hidden: bool) -> list[Record]:
    """Records with a label and a text; a warning tells how many had none."""
    texts = [column for column in (columns.text, columns.text_pair) if column]
    labels = [record.values[columns.label or ""] for record in records]
    if hidden and labels and all(label == -1 for label in labels):  # test of GLUE's STS-B: -1.0
        labels = [None] * len(labels)
    labelled = [r for r, label in zip(records, labels, strict=True) if label is not None]
    _warn(where, len(records) - len(labelled), len(records), "label")
    usable = [r for r in labelled if all(r.values[column] not in (None, "") for column in texts)]
    _warn(where, len(labelled) - len(usable), len(records), "text")
    return usable


def _warn(where: str, missing: int, total: int, what: str) -> None:
    if missing:
        message = f"{where}: {missing} of {total} rows have no {what} and are left out."
        warnings.warn(message, PastinaWarning, stacklevel=2)


def _records(table: Any, columns: Columns, where: str) -> Iterator[Record]:
    used = [c for c in (columns.text, columns.text_pair, columns.label) if c is not None]
    decoders = {column: _decoder(table.features[column]) for column in used}
    for number, values in enumerate(table.select_columns(used), 1):
        named = {column: decoders[column](value) for column, value in values.items()}
        yield Record(named, f"{where}, row {number}")


def _decoder(feature: Any) -> Decoder:
    """Class numbers -> names, also inside lists; -1 -> None; anything else as it is."""
    names = getattr(feature, "names", None)
    if names is not None:
        return lambda number: names[number] if number is not None and number >= 0 else None
    inner = getattr(feature, "feature", None)
    if getattr(inner, "names", None) is not None:
        name = _decoder(inner)
        return lambda numbers: None if numbers is None else [name(number) for number in numbers]
    return lambda value: value

"""One job of a grid, from its recipe to its record."""

import json
import shutil
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from pastina.backbones import find_backbone
from pastina.bench.grid import Job
from pastina.bench.memory import begin_peak, peak
from pastina.bench.results import Record, about
from pastina.errors import PastinaError
from pastina.files import WEIGHTS
from pastina.recipe import BackboneSpec
from pastina.training.evaluate import evaluate
from pastina.training.events import OnEvent
from pastina.training.fit import Run, machine, read_run, train, versions
from pastina.training.loop import Stopped


def execute(job: Job, folder: Path, on_event: OnEvent, *, with_test: bool) -> Record:
    """Train a job in its work folder, or go on there, and say what came out; a failure is a record too.

    with_test: look at the test part, once, with the adapter of the best epoch on dev.

    Raises:
        Stopped: Ctrl-C; the next call with this folder goes on.
    """
    record = _head(job)
    try:
        begin_peak()
        is_whole = not (folder / "recipe.toml").is_file()
        started = time.process_time()
        run = _trained(job, folder, on_event)
        # with reading and loading; of a run that was resumed nobody knows it
        cpu = {"cpu_seconds": round(time.process_time() - started, 2)} if is_whole else {}
        record |= {**_outcome(run), **cpu, **peak()}
    except Stopped:
        raise
    except Exception as error:  # a grid goes on, whatever one of its runs does
        return record | {"error": _sentence(error)}
    shutil.rmtree(folder / "state", ignore_errors=True)
    return tested(record, run.adapter) if with_test else record


def tested(record: Record, adapter: Path) -> Record:
    """The record with the metrics of the test part; there are none where no row of it has a label."""
    if not record["rows"]["test"]:
        return record | {"test": {}}
    try:
        test = evaluate(adapter, precision=record["recipe"]["fit"]["precision"])
    except Exception as error:
        return record | {"error": f"On test: {_sentence(error)}"}
    return record | {"test": test}


def failure(job: Job, error: Exception) -> Record:
    """The record of a job that could not be brought to its end."""
    return _head(job) | {"error": _sentence(error)}


def _sentence(error: Exception) -> str:
    text = str(error) if isinstance(error, PastinaError) else f"{type(error).__name__}: {error}"
    return text[:1000]


def _trained(job: Job, folder: Path, on_event: OnEvent) -> Run:
    """Go on where a killed run stood; what cannot be gone on with is begun again."""
    if (run := read_run(folder)) is not None:
        return run
    if (folder / "recipe.toml").is_file():
        try:
            return train(job.recipe, folder, resume=True, on_event=on_event)
        except Stopped:
            raise
        except PastinaError:
            shutil.rmtree(folder, ignore_errors=True)
    return train(job.recipe, folder, on_event=on_event)


def _head(job: Job) -> Record:
    """What a job is, before it ran."""
    return about(job) | {"versions": versions(), "machine": machine()}


def _outcome(run: Run) -> Record:
    result = json.loads((run.folder / "result.json").read_text(encoding="utf-8"))
    lines = (run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    epochs = [epoch for line in lines if (epoch := json.loads(line))["dev"]]  # the scored ones
    head, stored = _stored_parameters(run.adapter / WEIGHTS)
    backbone = result["backbone"]
    return {
        "metric": run.metric,
        "dev": run.metrics,
        "best_epoch": run.best_epoch,
        "epochs": {
            "epoch": [epoch["epoch"] for epoch in epochs],
            "loss": [epoch["loss"] for epoch in epochs],
            **{name: [epoch["dev"][name] for epoch in epochs] for name in run.metrics},
            "seconds": [epoch["seconds"] for epoch in epochs],
        },
        "steps": result["steps"],
        "rows": result["rows"],
        "parameters": {
            "adapter": run.trained_parameters - head,
            "head": head,
            "stored": stored,
            "backbone": backbone_parameters(backbone["name"], backbone["revision"]),
        },
        "bytes": run.adapter_bytes,
        "seconds": run.seconds,
        "engine": result["engine"],
        "digests": {
            "data": result["data_digest"],
            "backbone": backbone["digest"],
            "tokenizer": backbone["tokenizer_digest"],
            "adapter": result["adapter_digest"],
        },
        "versions": result["versions"],
        "machine": result["machine"],
    }


def _stored_parameters(weights: Path) -> tuple[int, int]:
    """Numbers in an adapter's file: those of the head, and the others."""
    counts = {True: 0, False: 0}
    with safe_open(weights, "pt") as file:
        for key in file.keys():  # noqa: SIM118
            is_head = ".classifier." in f".{key}"
            counts[is_head] += torch.Size(file.get_slice(key).get_shape()).numel()
    return counts[True], counts[False]


@lru_cache
def backbone_parameters(name: str, revision: str | None) -> int:
    """Numbers of a backbone with its pooler, from its config alone."""
    from transformers import AutoConfig, AutoModel

    files = find_backbone(BackboneSpec(name=name, revision=revision))
    config: Any = AutoConfig.from_pretrained(files.folder)
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import pastina
from tests.serving import Running, running, write_tokens


@pytest.fixture(scope="session")
def make(bert: Path) -> Callable[..., Path]:
    """`make(folder, kind, **options)`: an adapter on the tiny BERT; see tests/adapter_folder.py."""
    from tests.adapter_folder import make_adapter

    def write(folder: Path, kind: str = "classify", **options: Any) -> Path:
        folder.parent.mkdir(parents=True, exist_ok=True)
        return make_adapter(bert, folder, kind, **options)

    return write


@pytest.fixture(scope="session")
def folder(make: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks of all kinds, in a folder that nobody changes."""
    root = tmp_path_factory.mktemp("adapters")
    make(root / "acme" / "topics", labels=("fruit", "tool"), seed=1)
    make(root / "acme" / "many", labels=[f"label {i}" for i in range(17)], pooling="mean", seed=2)
    make(root / "acme" / "spans", "tag", seed=3)
    make(root / "globex" / "sets", "multilabel", labels=("a", "b", "c"), seed=4)
    make(root / "globex" / "number", "regress", scale=(10.0, 3.0), seed=5)
    make(root / "pairs" / "adapter", labels=("same", "other"), is_pair=True, seed=6)
    return root


@pytest.fixture(scope="session")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server on this folder, for this machine only."""
    log = tmp_path_factory.mktemp("server") / "log"
    options = ("--default-task", "acme/many", "--precision", "fp32", "--set", "max_chars=3000")
    with running(folder, log, *options, "--set", "poll_s=0.2") as server:
        yield server


@pytest.fixture(scope="session")
def guarded(
    make: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Running, Path]]:
    """A server with tokens and uploads, and its folder, which tests change."""
    place = tmp_path_factory.mktemp("guarded")
    for name in ("acme/topics", "globex/topics", "public"):
        make(place / "adapters" / name)
    tokens = write_tokens(place / "tokens.toml")
    options = ("--tokens", str(tokens), "--uploads", "--set", "poll_s=0.2", "--precision", "fp32")
    limits = ("--set", "max_upload=400000", "--set", "read_s=1")
    with running(place / "adapters", place / "log", *options, *limits) as server:
        yield server, place / "adapters"


@pytest.fixture
def client(server: Running) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


@pytest.fixture(scope="module")
def tasks(folder: Path, bert: Path) -> pastina.Tasks:
    """The same tasks without a server."""
    found = pastina.Tasks(str(bert), precision="fp32")
    for name in ("acme/topics", "acme/many", "acme/spans", "globex/sets", "globex/number", "pairs"):
        found.add(folder / name, name)
    return found

"""README and docs are true: their code runs, their commands exist, links lead somewhere.

How a page is run stands in docs/architecture.md, section "These pages".
"""

import contextlib
import csv
import importlib.util
import io
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from pastina.cli import app
from pastina.data.samples import sample_path
from pastina.recipe import read_recipe
from tests.backbone_folder import save_backbone

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [*PAGES, ROOT / "CHANGELOG.md"]
FENCE = re.compile(
    r"(?:<!-- not run: (?P<reason>[^>]+) -->\n)?"
    r"^```(?P<language>\w+)(?: (?P<name>\S+))?\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@dataclass(frozen=True)
class Block:
    """A fenced block; name: the file that it is; expected: what it prints, where the page says so."""

    language: str
    name: str | None
    text: str
    is_run: bool
    line: int
    expected: str | None


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = list(FENCE.finditer(text))
    result = []
    for match, after in pairwise([*found, None]):
        assert match is not None
        expected = None
        if after and after["language"] == "text" and not text[match.end() : after.start()].strip():
            expected = after["text"]
        result.append(
            Block(
                match["language"],
                match["name"],
                match["text"],
                match["reason"] is None,
                text.count("\n", 0, match.start("text")),
                expected,
            )
        )
    return result


def commands(block: Block) -> list[str]:
    return [line[2:] for line in block.text.splitlines() if line.startswith("$ ")]


# ---------------------------------------------------------------------------------------------------
# Running a page


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a reader is taken to have: some files, and a tiny model where a page names a large one."""
    folder = tmp_path_factory.mktemp("reader")
    save_backbone("bert", folder / "google-bert" / "bert-base-cased")
    rows = sample_path("intents_train.jsonl").read_text(encoding="utf-8").splitlines()[:40]
    with (folder / "tickets.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, ["text", "label"])
        table.writeheader()
        table.writerows(json.loads(row) for row in rows)
    (folder / "new.csv").write_text("text\nWhere is it?\n", encoding="utf-8")
    (folder / "messages.txt").write_text("Where is it?\nThank you\n", encoding="utf-8")
    return folder


@pytest.fixture
def reader(start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for path in start.iterdir():
        if path.is_dir():
            (tmp_path / path.name).symlink_to(path)
        else:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


@every_page
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # PEFT's use of it
def test_page_runs(page: Path, reader: Path) -> None:
    names: dict[str, Any] = {"__name__": page.stem}
    for block in blocks(page):
        where = f"{page.name}, line {block.line}"
        if block.language == "python":
            printed = run_python(block, names, where)
            if block.expected is not None:
                assert_like(printed, block.expected, where)
        elif block.language in ("console", "bash"):
            for command in commands(block):
                run_command(command, block.is_run, where)
        elif block.name is not None:
            (reader / block.name).write_text(block.text, encoding="utf-8")


def run_python(block: Block, names: dict[str, Any], where: str) -> str:
    # Line numbers of the page, so that a traceback leads there.
    code = compile("\n" * block.line + block.text, where, "exec", dont_inherit=True)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        if block.is_run:
            exec(code, names)
    return out.getvalue()


def assert_like(printed: str, expected: str, where: str) -> None:
    pattern = re.escape(expected.strip()).replace(re.escape("..."), ".*")
    assert re.fullmatch(pattern, printed.strip()), f"{where} prints:\n{printed}\nnot:\n{expected}"


def run_command(command: str, is_run: bool, where: str) -> None:
    words = shlex.split(command)
    if words[0] != "pastina":
        check_other(words, where)
        return
    stdin = None
    if "<" in words:
        at = words.index("<")
        stdin = Path(words[at + 1]).read_text(encoding="utf-8")
        words = words[:at]
    check_options(words[1:], where)
    if not is_run:
        return
    if words[1] == "train" and "--resume" not in words:
        words.append("fit.epochs=1")
    result = CliRunner().invoke(app, words[1:], input=stdin)
    if result.exception is not None:
        raise AssertionError(f"{where}: {command}: {result.exception!r}") from result.exception
    assert result.exit_code == 0, f"{where}: {command}: {result.output}"
    assert result.output.strip() or "--out" in words, f"{where}: {command} printed nothing"


def check_options(words: list[str], where: str) -> None:
    """The command exists, takes these arguments, and its recipe is a valid one."""
    group: Any = get_command(app)
    assert words[0] in group.commands, f"{where}: there is no command pastina {words[0]}"
    group.commands[words[0]].make_context(f"pastina {words[0]}", list(words[1:]))
    if words[0] in ("train", "recipe"):
        parts = [w for w in words[1:] if w.endswith(".toml") or ("=" in w and w[0] != "-")]
        files = [part for part in parts if "=" not in part]
        file = next(iter(files), None)
        if file is not None and not Path(file).is_file():
            file = str(ROOT / file)
        read_recipe(file, [part for part in parts if "=" in part])


def check_other(words: list[str], where: str) -> None:
    """Commands that are not ours: what they name in the tree must be there."""
    known = ("pip", "torchrun", "python", ".")
    assert words[0] in known or words[0].startswith("scripts/"), f"{where}: what is {words[0]}?"
    for word in words:
        if word.startswith(("scripts/", "examples/", "docs/", "tests/", "recipes/")):
            assert (ROOT / word).is_file(), f"{where}: there is no {word}"
    if "-m" in words:
        assert importlib.util.find_spec(words[words.index("-m") + 1])
        at = words.index("train")
        check_options(words[at:], where)


def test_what_the_harness_must_notice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page.md"
    page.write_text(
        "```python\nx = 1\n```\n\n```python\nprint(x + 1)\n```\n\n```text\n3\n```\n"
        "<!-- not run: no -->\n```console\n$ pastina recipe\n```\n```csv a.csv\nx\n```\n"
    )
    first, second, text, console, file = blocks(page)
    assert (first.line, second.line, console.is_run, file.name) == (1, 5, False, "a.csv")
    assert (first.expected, second.expected, text.expected) == (None, "3\n", None)
    names: dict[str, Any] = {}
    run_python(first, names, "here")
    with pytest.raises(AssertionError, match="here prints"):
        assert_like(run_python(second, names, "here"), "3\n", "here")
    assert_like("a 5 b", "a ... b", "here")
    with pytest.raises(AssertionError, match="no command pastina trian"):
        run_command("pastina trian", True, "here")
    with pytest.raises(Exception, match="--rezume"):
        run_command("pastina train --rezume", False, "here")
    with pytest.raises(Exception, match="epochs"):
        run_command("pastina train fit.epoch=1", False, "here")
    with pytest.raises(AssertionError, match="There is no folder nowhere"):
        run_command("pastina tasks nowhere", True, "here")
    with pytest.raises(AssertionError, match="no scripts/demon"):
        run_command("scripts/demon", True, "here")


# ---------------------------------------------------------------------------------------------------
# Generated parts and links


def generator() -> Any:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_parts_are_up_to_date() -> None:
    module = generator()
    for page in module.PARTS:
        now = (ROOT / "docs" / page).read_text(encoding="utf-8")
        assert module.fresh(page) == now, f"docs/{page} is old. Run: python docs/generate.py"


def test_generator_notices_what_nobody_described(monkeypatch: pytest.MonkeyPatch) -> None:
    module = generator()
    monkeypatch.delitem(module.KEYS, "fit.seed")
    with pytest.raises(SystemExit, match=r"fit\.seed"):
        module.keys()


def links(page: Path) -> Iterator[str]:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    yield from re.findall(r"\]\(([^)\s]+)\)", text)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of the headings."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert target.is_relative_to(ROOT), f"{page.name}: {link} leads out of the tree"
        if anchor:
            assert anchor in anchors(target), f"{page.name}: {link}: no such heading"


def test_every_page_is_listed() -> None:
    pages = {page.name for page in PAGES} - {"README.md"}
    for index in (ROOT / "README.md", ROOT / "docs" / "README.md"):
        listed = {Path(link).name for link in links(index)}
        assert pages <= listed, f"{index} does not list {pages - listed}"


def test_pictures_are_whole() -> None:
    import xml.etree.ElementTree as ET

    pictures = list((ROOT / "docs").glob("*.svg"))
    assert pictures
    for picture in pictures:
        root = ET.parse(picture).getroot()
        tags = {element.tag.rpartition("}")[2] for element in root.iter()}
        assert {"svg", "title", "desc"} <= tags, f"{picture.name} needs a title and a description"
        assert "script" not in tags

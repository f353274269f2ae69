"""`pastina look` as a user calls it."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pastina.cli import app
from pastina.errors import DataError
from pastina.looking.summary import COLUMNS
from pastina.recipe import PastaOptions
from tests.adapter_folder import make_adapter


@pytest.fixture(scope="module")
def adapter(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(bert, tmp_path_factory.mktemp("cli") / "a", "classify")


@pytest.fixture(scope="module")
def pairs(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(bert, tmp_path_factory.mktemp("cli") / "p", "classify", is_pair=True)


def test_page_picture_and_table(adapter: Path, tmp_path: Path) -> None:
    file = tmp_path / "texts.txt"
    file.write_bytes(b"\xef\xbb\xbfwe need a plum\r\nsend me the hammer\n")
    page, picture = tmp_path / "a.html", tmp_path / "a.png"
    words = [str(adapter), "--file", str(file), "--html", str(page), "--picture", str(picture)]
    result = CliRunner().invoke(app, ["look", *words])
    assert result.exit_code == 0, result.output
    lines = [line.split("\t") for line in result.stdout.splitlines()]
    assert lines[0] == [*COLUMNS, "vectors"]
    assert [line[0] for line in lines[1:]] == ["1", "2", "all"]
    assert page.read_text(encoding="utf-8").count("send me the hammer") == 1
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert f"written: {page}" in result.stderr


def test_json(pairs: Path) -> None:
    result = CliRunner().invoke(app, ["look", str(pairs), "--json"], input="a plum\tthe nail\n")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    text = found["texts"][0]
    assert (text["text"], text["text_pair"]) == ("a plum", "the nail")
    row = text["maps"]["after_LHTT"][1][0][2]
    assert sum(row) == pytest.approx(1, abs=1e-5)
    assert len(row) == len(text["tokens"])
    few = CliRunner().invoke(app, ["look", str(pairs), "a", "b", "--json", "--maps", "0"])
    assert json.loads(few.stdout)["texts"] == []


def test_wrong_use(adapter: Path, pairs: Path, tmp_path: Path) -> None:
    def run(*words: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["look", *words])
        return result.exit_code, result.stderr.replace("\n", " ") + repr(result.exception)

    code, said = run(str(adapter), "a", "--picture", "a.gif")
    assert code == 2
    assert "a.gif" in said
    assert run(str(adapter), "a", "--file", "x.csv")[0] == 2
    assert run(str(adapter), "a", "--maps", "-1")[0] == 2
    assert "is not an adapter" in run(str(tmp_path), "a")[1]
    assert "1 texts were given" in run(str(pairs), "a")[1]
    assert "does not exist" in run(str(adapter), "--file", str(tmp_path / "no.txt"))[1]
    (tmp_path / "bad.txt").write_bytes(b"a plum\n\xff\n")
    assert "line 2" in run(str(adapter), "--file", str(tmp_path / "bad.txt"))[1]
    (tmp_path / "gap.txt").write_text("a plum\n\nfig\n")
    result = CliRunner().invoke(app, ["look", str(adapter), "--file", str(tmp_path / "gap.txt")])
    assert isinstance(result.exception, DataError)
    assert "gap.txt, line 2: the text is empty" in str(result.exception)


def test_variants_are_shown_and_not_refused(bert: Path, tmp_path: Path) -> None:
    options = PastaOptions(share="by_token", everywhere=True, rank=2)
    folder = make_adapter(bert, tmp_path / "wide", "classify", options)
    words = ["look", str(folder), "we need a plum"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    lines = [line.split("\t") for line in result.stdout.splitlines()]
    assert lines[0][len(COLUMNS) :] == ["vectors", "vector of every token", "product"]
    found = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)["vectors"]
    assert found["names"] == ["[CLS]", "[SEP]", "every token"]
    assert lines[1][-1] == f"{found['product_ratio_L'][0]:.2f} ×"
    assert lines[1][-2] == f"{found['ratio_LV'][0][-1]:.2f} ×"

"""A file is the old one or the new one; what is no plain file is left alone."""

import os
from pathlib import Path

import pytest

from pastina.errors import PastinaError
from pastina.files import no_empty_folders, whole_file


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail_midway() -> None:
        with whole_file(path) as file:
            file.write("ne")
            raise InterruptedError

    with pytest.raises(InterruptedError):
        fail_midway()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_folders_that_stay_empty_go_again(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    with no_empty_folders(tmp_path / "old"), no_empty_folders(tmp_path / "new" / "inner"):
        assert (tmp_path / "new" / "inner").is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    with no_empty_folders(tmp_path / "new" / "inner"):
        (tmp_path / "new" / "mine.txt").touch()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["mine.txt"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    target, link = tmp_path / "target.txt", tmp_path / "link.txt"
    target.write_text("old")
    link.symlink_to(target)
    with whole_file(link) as file:
        file.write("new")
    assert link.is_symlink()
    assert target.read_text() == "new"


def test_a_pipe_is_left_alone(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(PastinaError, match="not a plain file"), whole_file(pipe) as file:
        file.write("x")
    assert pipe.is_fifo()


def test_others_may_read_it(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with whole_file(path) as file:
        file.write("x")
    plain = tmp_path / "b.txt"
    plain.write_text("x")
    assert path.stat().st_mode == plain.stat().st_mode

"""Tokens: who sees and calls what, and how fast."""

import hashlib
import math
import time
from pathlib import Path

import pytest

from pastina.errors import PastinaError
from pastina.serve.access import ANYBODY, Access, Caller
from pastina.serve.settings import Settings, make_settings
from tests.serving import ACME, ADMIN, SLOW, write_tokens


def header(token: str) -> bytes:
    return f"Bearer {token}".encode()


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    return write_tokens(tmp_path / "tokens.toml")


def test_callers(tokens: Path) -> None:
    access = Access(tokens)
    admin, acme = access.caller(header(ADMIN)), access.caller(header(ACME))
    assert admin is not None
    assert acme is not None
    assert (admin.is_admin, admin.may_see_metrics, admin.may_call("any/task")) == (True,) * 3
    assert (acme.is_admin, acme.may_see_metrics) == (False, False)
    entry = tokens.read_text().split("[[token]]")[1]
    for change, may_see in (
        (('["*"]', '["acme/*"]'), False),  # the metrics tell of the tasks of others
        (("admin = true", "metrics = true"), True),
    ):
        tokens.write_text(f"[[token]]{entry.replace(*change)}")
        own = Access(tokens).caller(header(ADMIN))
        assert own is not None
        assert own.may_see_metrics == may_see
    assert [acme.may_call(n) for n in ("acme/x", "acme/y/z", "public", "globex/x", "acme")] == [
        True,
        True,
        True,
        False,
        False,
    ]
    assert access.caller(b"bearer   " + ACME.encode()) is acme
    digest = hashlib.sha256(ACME.encode()).hexdigest()
    for wrong in (None, b"", b"Bearer", b"Bearer ", header("x"), b"Basic " + ACME.encode()):
        assert access.caller(wrong) is None
    assert access.caller(header(digest)) is None, "the file alone does not let anybody in"
    assert Access(None).caller(None) is ANYBODY


def test_thousands_of_tokens(tmp_path: Path) -> None:
    """One for each customer: who asks is found in the same time."""
    path = tmp_path / "many.toml"
    entries = []
    for i in range(3000):
        digest = hashlib.sha256(f"token {i}".encode()).hexdigest()
        entries.append(f'[[token]]\nname = "{i}"\nsha256 = "{digest}"\ntasks = ["customer{i}/*"]\n')
    path.write_text("\n".join(entries))
    access = Access(path)
    for i in (0, 1500, 2999):
        caller = access.caller(header(f"token {i}"))
        assert caller is not None
        assert caller.name == str(i)
        assert caller.may_call(f"customer{i}/x")
        assert not caller.may_call(f"customer{i + 1}/x")
    assert access.caller(header("token 3000")) is None


def test_rate(tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    slow = Access(tokens).caller(header(SLOW))
    assert slow is not None
    assert [slow.wait_for(1) for _ in range(4)] == [0.0] * 4
    assert slow.wait_for(1) == pytest.approx(2.0)
    now += 2.0
    assert slow.wait_for(1) == 0.0
    now += 1000.0
    assert slow.wait_for(100) == 0.0, "more than a burst at once passes when the bucket is full"
    assert slow.wait_for(1) == pytest.approx((1 + 96) / 0.5)
    slow.give_back(96)
    assert slow.wait_for(1) == pytest.approx(2.0), "it was not counted"
    assert slow.paid().wait_for(1000) == 0.0
    assert slow.wait_for(1) == pytest.approx(2.0)
    assert Caller("x", ()).wait_for(10**9) == 0.0
    assert ANYBODY.left == math.inf


def test_the_file_is_read_again(
    tokens: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("pastina.serve.access._LOOK", 0.0)
    access = Access(tokens)
    slow = access.caller(header(SLOW))
    assert slow is not None
    slow.wait_for(3)
    tokens.write_text(tokens.read_text().replace('"globex/*"', '"other/*"'))
    again = access.caller(header(SLOW))
    assert again is not None
    assert again is not slow
    assert again.left == pytest.approx(1, abs=0.2), "what is left of a rate is kept"
    tokens.write_text("[[token]]\n")
    assert access.caller(header(SLOW)) is again
    assert "the old ones hold" in caplog.text
    tokens.unlink()
    assert access.caller(header(SLOW)) is again
    write_tokens(tokens)
    tokens.write_text(tokens.read_text().split("[[token]]")[1].join(["[[token]]", ""]))
    assert access.caller(header(ADMIN)) is not None
    assert access.caller(header(SLOW)) is None


GOOD = '[[token]]\nname = "a"\nsha256 = "' + "0" * 64 + '"\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[token", "not a TOML file"),
        ("\xff", "not a TOML file"),
        ("", "token: Field required"),
        ('[[token]]\nname = "a"\n', "sha256: Field required"),
        (GOOD.replace("0" * 64, "secret"), "sha256: String should match"),
        (GOOD + "taks = []\n", "taks: Extra inputs"),
        (GOOD + "rate = 0\n", "rate: Input should be greater"),
        (GOOD + GOOD, "two tokens have the name 'a'"),
        (GOOD + GOOD.replace('"a"', '"b"'), "two tokens have the sha256"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "tokens.toml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(PastinaError, match=words) as caught:
        Access(path)
    assert "secret" not in str(caught.value)
    with pytest.raises(PastinaError, match="no file of tokens"):
        Access(tmp_path / "nowhere")


def test_settings(tmp_path: Path) -> None:
    with pytest.raises(PastinaError, match="open to others"):
        Settings(folder="x", host="0.0.0.0")
    with pytest.raises(PastinaError, match="admin = true"):
        Settings(folder="x", uploads=True)
    assert Settings(folder="x", host="0.0.0.0", tokens=tmp_path).uploads is False
    assert make_settings({"folder": "x"}, ["max_tokens=64", "wait_ms=0"]).max_tokens == 64
    for override, words in (
        ("max_token=64", "Did you mean 'max_tokens'"),
        ("max_tokens=x", "max_tokens: .*seen: 'x'"),
        ("max_tokens=0", "max_tokens: "),
        ("max_tokens", "not KEY=VALUE"),
    ):
        with pytest.raises(PastinaError, match=words):
            make_settings({"folder": "x"}, [override])

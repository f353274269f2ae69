"""Who may list and call what: bearer tokens from a file.

    [[token]]
    name = "acme"
    sha256 = "..."            # of the token, in hexadecimal digits
    tasks = ["acme/*"]
    rate = 50                 # texts a second; left out: no limit

The file is read again when it changes.
"""

import hashlib
import hmac
import logging
import math
import secrets
import time
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pastina.errors import PastinaError
from pastina.files import whole_file

logger = logging.getLogger("pastina.serve")
_LOOK = 1.0  # seconds between two looks at the file


class TokenSpec(BaseModel):
    """An entry of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(min_length=1, max_length=100)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    tasks: tuple[str, ...] = ()
    rate: Annotated[float, Field(gt=0)] | None = None
    burst: Annotated[float, Field(ge=1)] | None = None
    admin: bool = False
    metrics: bool = False


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    token: tuple[TokenSpec, ...]


@dataclass(slots=True)
class Caller:
    """Somebody who showed a token; or anybody on this machine, where there are no tokens."""

    name: str
    patterns: tuple[str, ...]
    is_admin: bool = False
    may_see_metrics: bool = False
    rate: float | None = None
    burst: float = math.inf
    left: float = math.inf
    since: float = 0.0

    def may_call(self, task: str) -> bool:
        """Whether this task is there for them."""
        return matches(self.patterns, task)

    def wait_for(self, count: int) -> float:
        """Take so many texts from what is left; 0, or the seconds to wait first."""
        if self.rate is None:
            return 0.0
        now = time.monotonic()
        self.left = min(self.burst, self.left + (now - self.since) * self.rate)
        self.since = now
        needed = min(count, self.burst)  # more than a burst at once: when the bucket is full
        if self.left < needed:
            return (needed - self.left) / self.rate
        self.left -= count
        return 0.0

    def give_back(self, count: int) -> None:
        """Put back what was taken for texts that nobody looked at."""
        self.left += count

    def paid(self) -> "Caller":
        """The same caller, with a request of which nothing is counted any more."""
        return replace(self, rate=None)


@lru_cache(maxsize=65536)
def matches(patterns: tuple[str, ...], task: str) -> bool:
    """Whether one of these patterns stands for this task."""
    return any(fnmatchcase(task, pattern) for pattern in patterns)


_NOBODY = (b"", Caller("nobody", ()))
ANYBODY = Caller("anybody", ("*",), may_see_metrics=True)


class Access:
    """The callers by their tokens. path: of the file; None: anybody may call everything.

    Raises:
        PastinaError: the file cannot be used.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._callers: dict[bytes, tuple[bytes, Caller]] = {}  # by the digest of their token
        self._stamp: tuple[int, ...] = ()
        self._looked = 0.0
        if path is not None:
            self._stamp = _stamp(path)
            self._callers = _callers(read_tokens(path), {})

    def caller(self, header: bytes | None) -> Caller | None:
        """Who sent this Authorization header; None: nobody we know."""
        if self.path is None:
            return ANYBODY
        self._look()
        scheme, _, token = (header or b"").partition(b" ")
        if scheme.lower() != b"bearer":
            return None
        digest = hashlib.sha256(token.strip()).digest()
        # How long the look-up takes tells of the digest only, by a hash whose key nobody knows; and
        # who knew all of a digest would not know a token.
        known, caller = self._callers.get(digest, _NOBODY)
        return caller if hmac.compare_digest(known, digest) else None

    def _look(self) -> None:
        """Read the file again if it changed; one that cannot be used changes nothing."""
        now = time.monotonic()
        if self.path is None or now - self._looked < _LOOK:
            return
        self._looked = now
        stamp = _stamp(self.path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            specs = read_tokens(self.path)
        except PastinaError as error:
            logger.error(
                "the tokens cannot be read, the old ones hold", extra={"reason": str(error)}
            )
            return
        self._callers = _callers(specs, self._callers)
        logger.info("tokens read again", extra={"tokens": len(specs)})


def read_tokens(path: Path) -> tuple[TokenSpec, ...]:
    """The entries of a file of tokens.

    Raises:
        PastinaError: it is not there, or says something that is not understood.
    """
    try:
        specs = _File.model_validate(tomllib.loads(path.read_text(encoding="utf-8"))).token
    except FileNotFoundError:
        raise PastinaError(f"There is no file of tokens {path}.") from None
    except OSError as error:
        raise PastinaError(f"{path} cannot be read: {error.strerror}.") from None
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise PastinaError(f"{path}: {where}: {first['msg']}.") from None
    except ValueError as error:  # not TOML, not UTF-8
        raise PastinaError(f"{path} is not a TOML file: {error}.") from None
    _check_different(path, [spec.name for spec in specs], "name")
    _check_different(path, [spec.sha256 for spec in specs], "sha256")
    return specs


def token_file(path: Path, name: str = "admin", tasks: str = "*") -> tuple[Path, str]:
    """Write a file with one new token that may do everything; the file, and the token itself."""
    token = secrets.token_urlsafe(32)
    digest = hashlib.sha256(token.encode()).hexdigest()
    with whole_file(path) as file:
        file.write(
            f'[[token]]\nname = "{name}"\nsha256 = "{digest}"\ntasks = ["{tasks}"]\nadmin = true\n'
        )
    return path, token


def _check_different(path: Path, values: Iterable[str], what: str) -> None:
    seen: set[str] = set()
    for value in values:
        if value in seen:
            raise PastinaError(f"{path}: two tokens have the {what} {value[:20]!r}. Change one.")
        seen.add(value)


def _callers(
    specs: Iterable[TokenSpec], before: Mapping[bytes, tuple[bytes, Caller]]
) -> dict[bytes, tuple[bytes, Caller]]:
    """A caller for each entry; whoever was there before keeps what is left of their rate."""
    old = {caller.name: caller for _, caller in before.values()}
    found = {}
    for spec in specs:
        burst = spec.burst or max(1.0, spec.rate or 1.0)
        # the metrics name the tasks of everybody
        may_see_metrics = spec.metrics or (spec.admin and "*" in spec.tasks)
        caller = Caller(spec.name, spec.tasks, spec.admin, may_see_metrics, spec.rate, burst, burst)
        if (known := old.get(spec.name)) is not None and known.rate == caller.rate:
            caller.left, caller.since = min(known.left, burst), known.since
        else:
            caller.since = time.monotonic()
        digest = bytes.fromhex(spec.sha256)
        found[digest] = (digest, caller)
    return found


def _stamp(path: Path) -> tuple[int, ...]:
    try:
        stat = path.stat()
    except OSError:
        return ()
    return (stat.st_ino, stat.st_mtime_ns, stat.st_size)

"""How a server is set up: the only place where a default of it lives."""

import ipaddress
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pastina.errors import PastinaError
from pastina.nearest import nearest

Positive = Annotated[int, Field(ge=1)]
MOST_TEXTS = 4096  # in a request, whatever the settings: longer lists are not even looked through


class Settings(BaseModel):
    """See docs/serving.md for what each of these does.

    Raises:
        PastinaError: settings that do not go together.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    folder: str
    backbone: str | None = None
    precision: Literal["auto", "fp32", "bf16", "int8"] = "auto"
    threads: Annotated[int, Field(ge=0)] = 0

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    tokens: Path | None = None
    uploads: bool = False
    default_task: str | None = None

    max_tokens: Positive = 1024
    wait_ms: Annotated[float, Field(ge=0, le=1000)] = 2.0
    deadline_s: Annotated[float, Field(gt=0)] = 30.0
    poll_s: Annotated[float, Field(ge=0.05)] = 1.0

    max_chars: Positive = 20_000
    max_texts: Annotated[int, Field(ge=1, le=MOST_TEXTS)] = 256
    max_body: Positive = 2_000_000
    max_upload: Positive = 16_000_000
    queue_texts: Positive = 2048
    queue_chars: Positive = 4_000_000
    connections: Positive = 1024
    read_s: Annotated[float, Field(gt=0)] = 10.0
    stop_s: Annotated[int, Field(ge=0)] = 20

    metric_tasks: Annotated[int, Field(ge=0)] = 1000
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @property
    def is_remote(self) -> bool:
        """Whether the folder is an address that fsspec reaches."""
        return "://" in self.folder or "::" in self.folder

    @model_validator(mode="after")
    def _check(self) -> "Settings":
        if self.tokens is None and not is_loopback(self.host):
            raise PastinaError(
                f"Without a file of tokens only this machine may ask, and {self.host} is open to "
                "others. Name a file with --tokens, or leave out --host."
            )
        if self.tokens is None and self.uploads:
            raise PastinaError("Uploads need a token with admin = true. Name a file with --tokens.")
        return self


def make_settings(values: Mapping[str, Any], overrides: Iterable[str] = ()) -> Settings:
    """Settings from values and from texts such as "max_tokens=2048".

    Raises:
        PastinaError: an unknown setting, a value that it cannot have, or what does not go together.
    """
    known = dict(values)
    for override in overrides:
        key, sign, value = override.partition("=")
        if not sign:
            raise PastinaError(f"{override!r} is not KEY=VALUE.")
        if key not in Settings.model_fields:
            near = nearest(key, list(Settings.model_fields))
            hint = f" Did you mean {near!r}?" if near else ""
            raise PastinaError(f"There is no setting {key!r}.{hint}")
        known[key] = value
    try:
        return Settings.model_validate(known)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise PastinaError(f"{where}: {first['msg']}; seen: {first['input']!r}.") from None


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches this address.

    >>> is_loopback("localhost"), is_loopback("127.0.0.1"), is_loopback("::1"), is_loopback("0.0.0.0")
    (True, True, True, False)
    """
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"

"""Names of tasks that are safe as parts of a path and of a URL."""

import re
import unicodedata

MAX_PARTS = 5
_PART = re.compile(r"\w[\w.\-]*")
_MAX_BYTES = 120  # of a part: a file system takes 255, and we write aside under longer names
RUN = "adapter"  # of a run's folder, which is known by the name of the run
RESERVED = {RUN: "runs", "predict": "the route that asks"}


def why_not_a_name(name: str) -> str | None:
    """Why this cannot name a task; None: it can. Parts stand between slashes.

    >>> why_not_a_name("acme/tickets-2"), why_not_a_name("../x")
    (None, "'..' is not made of letters, digits, '_', '-' and '.', with no sign in front")
    """
    parts = name.split("/")
    if len(parts) > MAX_PARTS:
        return f"it has {len(parts)} parts, and {MAX_PARTS} are the most"
    for part in parts:
        if not _PART.fullmatch(part):
            shown = repr(part[:50])
            return (
                f"{shown} is not made of letters, digits, '_', '-' and '.', with no sign in front"
            )
        if len(part.encode()) > _MAX_BYTES:
            return f"{part[:20]!r}... has more than {_MAX_BYTES} bytes"
        if unicodedata.normalize("NFC", part) != part:
            return f"{part[:50]!r} is not in Unicode's normal form C"
    if parts[-1] in RESERVED and len(parts) > 1:
        return f"{parts[-1]!r} at the end is kept for {RESERVED[parts[-1]]}"
    return None


def task_name(path: str) -> str:
    """The name of the task whose adapter lies at this path below the folder.

    >>> task_name("acme/tickets"), task_name("acme/tickets/adapter"), task_name("adapter")
    ('acme/tickets', 'acme/tickets', 'adapter')
    """
    return path.removesuffix(f"/{RUN}")

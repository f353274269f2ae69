"""A bank kept like the folder: what is there answers, what is gone does not, what is broken says why."""

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pastina.adapter import Card, check_content
from pastina.backbones import find_backbone
from pastina.bank import Bank
from pastina.errors import AdapterError, BackboneError, PastinaError
from pastina.files import CARD, CONFIG, WEIGHTS
from pastina.recipe import BackboneSpec
from pastina.serve.lookout import SHARE, Found, Lookout
from pastina.serve.names import why_not_a_name
from pastina.serve.store import Signature, Store

Info = dict[str, Any]  # of a task, plain values; see `_info`
Changes = dict[str, Info | None]  # of tasks; None: gone
OnChange = Callable[[Changes], None]
logger = logging.getLogger("pastina.serve")

_LOOKED_AT = 100  # cards that say which backbone is meant
_TELL = 0.05  # seconds after which changes are told, though there may be more
_SHORT = 200  # characters of what a card says of itself that are told


@dataclass(frozen=True, slots=True)
class _Seen:
    """A task as it was found. info: what was told of it. refused: of any of its files, if it was."""

    signature: Signature
    info: Info
    refused: Signature | None = None


class Registry:
    """The tasks of a folder in a bank. on_change: hears of new and changed tasks; None: gone."""

    def __init__(self, store: Store, bank: Bank, on_change: OnChange) -> None:
        self.store, self.bank, self.on_change = store, bank, on_change
        self._seen: dict[str, _Seen] = {}
        self._changed: dict[str, float] = {}  # by us, and when: no look has begun since
        self._unsure: set[str] = set()  # tasks that could not be judged at the last look
        self._lock = threading.RLock()

    def run(self, lookout: Lookout, poll_s: float, is_over: threading.Event) -> None:
        """Keep the bank like the folder, by what the lookout says."""
        due = 0.0
        while not is_over.is_set():
            try:
                for message in lookout.hear(poll_s):
                    self.hear(*message)
                started = time.monotonic()
                if started >= due:
                    self.look_again()
                    due = time.monotonic() + (time.monotonic() - started) / SHARE
            except Exception:  # whatever it was, the next lookout tells all again
                logger.exception("a bug")
                lookout.close()
                is_over.wait(poll_s)

    def scan(self) -> bool:
        """Make the bank like the folder; False if the folder cannot be read, then all stays."""
        started = time.monotonic()
        try:
            found = self.store.scan()
        except Exception as error:  # of whatever fsspec reaches
            self.hear("failed", started, _reason(error))
            return False
        with self._lock:
            gone = dict.fromkeys(self._seen.keys() - found.keys())
            self.hear("changed", started, gone | found)
        return True

    def hear(self, what: str, started: float, found: Found | str) -> None:
        """Make the bank like the folder, as far as it was seen; see `Lookout.hear`.

        What is missing in all that a new process saw it had perhaps only no way to look at.
        """
        if isinstance(found, str):
            logger.error("the folder cannot be read", extra={"reason": found})
            return
        with self._lock:
            self._changed = {name: own for name, own in self._changed.items() if own >= started}
            if what == "all":
                missing = self._seen.keys() - found.keys()
                nobody = {name for name in missing if why_not_a_name(name) is not None}
                self._unsure |= missing - nobody
                found = dict.fromkeys(nobody) | dict(found)
            self._tell(self._changes_of(*own) for own in found.items())

    def look_again(self) -> None:
        """Look at what was refused, of which any file may be another by now, and at what could not be
        judged the last time; finish what a server that was killed left."""
        with self._lock:
            names, self._unsure = list(self._unsure), set()
            names += [name for name, seen in self._seen.items() if seen.refused is not None]
            self._tell(self._changes_at(name) for name in names)
            self._tidy()

    def _tidy(self) -> None:
        try:
            self.store.tidy()
        except Exception as error:  # of whatever fsspec reaches
            logger.error("the folder cannot be tidied", extra={"reason": _reason(error)})

    def _tell(self, each: Iterable[Changes]) -> None:
        """Pass changes on, those of many tasks in several parts."""
        told, changes = time.monotonic(), Changes()
        for own in each:
            changes |= own
            if changes and time.monotonic() - told > _TELL:
                self.on_change(changes)
                told, changes = time.monotonic(), {}
        if changes:
            self.on_change(changes)

    def _changes_of(self, name: str, signature: Signature | None) -> Changes:
        """What changes by what a look saw of a task, unless we changed it since that look began."""
        if name not in self._changed:
            return self._take(name, signature)
        self._unsure.add(name)
        return {}

    def _changes_at(self, name: str) -> Changes:
        """What changes by what lies there now; a name that no task can have is left to the lookout."""
        seen = self._seen.get(name)
        try:
            if seen is not None and seen.refused == self.store.look(name):
                return {}
            if why_not_a_name(name) is not None:
                return {}
            signature = self.store.find(name)
        except Exception as error:  # of whatever fsspec reaches
            return self._leave(name, error)
        return self._take(name, signature)

    def _take(self, name: str, signature: Signature | None) -> Changes:
        """What changes by this signature; nothing, if the task cannot be looked at for the moment."""
        try:
            return self._apply(name, signature)
        except Exception as error:  # of whatever fsspec reaches
            return self._leave(name, error)

    def _apply(self, name: str, signature: Signature | None) -> Changes:
        if signature is None:
            return self._forget(name) if name in self._seen else {}
        return self._load(name, signature) if self._is_new(name, signature) else {}

    def _leave(self, name: str, error: Exception) -> Changes:
        about = {"task": name, "reason": _reason(error)}
        logger.error("the task cannot be looked at", extra=about)
        self._unsure.add(name)
        return {}

    def _is_new(self, name: str, signature: Signature) -> bool:
        seen = self._seen.get(name)
        if seen is None or seen.signature != signature:
            return True
        return seen.refused is not None and seen.refused != self.store.look(name)

    def _load(self, name: str, signature: Signature) -> Changes:
        """Take in what lies there now; what changes by that."""
        before, files = self._seen.get(name), self.store.look(name)
        try:
            if reason := why_not_a_name(name):
                raise AdapterError(f"The name of the folder {name!r} cannot name a task: {reason}.")
            path, *content = self.store.read(name)
            card, num_bytes = self._take_in(name, path, *content), sum(map(len, content))
        except Exception as error:
            is_still_there = files and files == self.store.look(name)
            if not is_still_there and why_not_a_name(name) is None:
                self._unsure.add(name)  # somebody is writing there
                return {}
            reason = _reason(error).replace(f"{self.store.root}/", "")
            old = {} if before is None else before.info
            info = {"name": name, **old, "refused": reason}
            self._seen[name] = _Seen(signature, info, files)
            if old.get("refused") == reason:
                return {}
            logger.warning("adapter refused", extra={"task": name, "reason": reason})
            return {name: info}
        info = _info(name, card, num_bytes)
        self._seen[name] = _Seen(signature, info)
        if before is not None and before.info == info:
            return {}
        word = "task replaced" if before and "digest" in before.info else "task added"
        logger.info(word, extra={"task": name, "digest": card.digest})
        return {name: info}

    def _take_in(self, name: str, path: Path, card: bytes, weights: bytes, config: bytes) -> Card:
        content = check_content(path, card, weights, config)
        self.bank.put(self.bank.check(content, path), name)
        return content.card

    def _forget(self, name: str) -> Changes:
        logger.info("task removed", extra={"task": name})
        if "digest" in self._seen.pop(name).info:
            self.bank.remove(name)
        return {name: None}

    def install(self, name: str, files: Mapping[str, bytes]) -> Info:
        """Check an adapter, write it into the folder, and let it answer from the next batch on.

        Raises:
            AdapterError: it is broken or foreign, or the name is not free. Nothing was written.
            OSError: it cannot be written.
        """
        if reason := why_not_a_name(name):
            raise AdapterError(f"{name[:200]!r} cannot name a task: {reason}.")
        with self._lock:
            for file in (CARD, WEIGHTS, CONFIG):
                if file not in files:
                    raise AdapterError(f"The archive is not an adapter: {file} is missing.")
            where = Path(name)
            content = check_content(where, files[CARD], files[WEIGHTS], files[CONFIG])
            self.bank.check(content, where)
            is_new = name not in self._seen
            self.store.install(name, files)
            self._look_at(name)
            info = _info(name, content.card, sum(map(len, files.values())))
            if name in self._seen:  # somebody else may have changed it since
                info = self._seen[name].info
            if "digest" not in info:
                raise AdapterError(f"Somebody else broke it meanwhile: {info['refused']}")
            return info | {"is_new": is_new}

    def remove(self, name: str) -> bool:
        """Remove a task's adapter from the folder; False if there is none."""
        with self._lock:
            if name not in self._seen:
                return False
            self.store.remove(name)
            self._look_at(name)
            return True

    def _look_at(self, name: str) -> None:
        """Make the bank like the folder, as far as this task goes: that takes no longer among many."""
        self._tell([self._apply(name, self.store.find(name))])
        self._changed[name] = time.monotonic()


def choose_backbone(store: Store) -> BackboneSpec:
    """The backbone that most of the first hundred adapters were made for, of those that can be found;
    without any adapter the default one.

    Raises:
        PastinaError: the folder cannot be read.
    """
    votes: Counter[tuple[str, str | None]] = Counter()
    try:
        names = sorted(store.scan())
    except Exception as error:
        raise PastinaError(f"The folder cannot be read: {_reason(error)}.") from None
    for name in names[:_LOOKED_AT]:
        try:
            path, *content = store.read(name)
            backbone = check_content(path, *content).card.backbone
        except Exception:  # of whatever fsspec reaches
            continue  # it will be refused, with its reason
        votes[backbone.name, backbone.revision] += 1
    specs = [BackboneSpec(name=name, revision=own) for (name, own), _ in votes.most_common()]
    if len(specs) < 2:
        return specs[0] if specs else BackboneSpec()
    return next((spec for spec in specs if _is_here(spec)), specs[0])


def _is_here(spec: BackboneSpec) -> bool:
    try:
        find_backbone(spec)
    except BackboneError as error:
        logger.warning("backbone not found", extra={"backbone": spec.name, "reason": str(error)})
        return False
    return True


def _info(name: str, card: Card, num_bytes: int) -> Info:
    """What can be told of a task."""
    return {
        "name": name,
        "kind": card.kind,
        "labels": list(card.labels),
        "method": card.method,
        "is_pair": card.is_pair,
        "max_length": card.max_length,
        "digest": card.digest,
        "metrics": {
            part: {key: value if math.isfinite(value) else None for key, value in own.items()}
            for part, own in card.metrics.items()
        },
        "bytes": num_bytes,
        "backbone": card.backbone.name[:_SHORT],
        "created": card.created[:_SHORT],
        "version": card.versions.get("pastina", "")[:_SHORT] or None,
        "refused": None,
    }


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, PastinaError) else repr(error)

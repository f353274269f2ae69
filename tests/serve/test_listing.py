"""The names that a caller sees, and those that were perhaps meant."""

from typing import Any, cast

from pastina.nearest import nearest_names
from pastina.serve.link import Link
from pastina.serve.listing import Listing


def link_of(*names: str) -> Link:
    link = Link({}, lambda measures: None)
    tell(link, {name: {} for name in names})
    return link


def tell(link: Link, changes: dict[str, Any]) -> None:
    """As the engine does."""
    from pastina.serve.frames import pack

    link.connection_made(cast(Any, None))
    link.data_received(pack(("tasks", changes)))


def test_names_are_sorted_again_only_when_tasks_come_or_go() -> None:
    link = link_of("b", "a/x", "a/y")
    listing = Listing(link)
    everything = listing.names(("*",))
    assert everything == ["a/x", "a/y", "b"]
    assert listing.names(("a/*",)) == ["a/x", "a/y"]
    tell(link, {"b": {"digest": "another"}})
    assert listing.names(("*",)) is everything
    tell(link, {"c": {}, "a/x": None})
    assert listing.names(("*",)) == ["a/y", "b", "c"]
    assert listing.names(("a/*",)) == ["a/y"]
    for i in range(200):  # so many sorts of callers are not all kept
        assert listing.names((f"a/{i}", "c")) == ["c"]
    assert len(listing._kept) < 100


def test_near_names_are_those_that_the_caller_may_see() -> None:
    listing = Listing(link_of("acme/topics", "globex/topics"))
    assert "globex/topics" not in listing.near(("acme/*",), "globex/topic")
    assert listing.near(("*",), "globex/topic")[0] == "globex/topics"
    assert listing.near(("acme/*",), "acme/topic") == ["acme/topics"]
    assert listing.near(("*",), "x" * 10_000) == []


def test_the_nearest_of_thousands() -> None:
    names = [f"customer{i}/intents" for i in range(5000)]
    names += [f"customer{i}/orders" for i in range(5000)]
    for typed in ("customr4711/intents", "customer4711/intent", "kustomer4711/intents"):
        assert nearest_names(typed, names)[0] == "customer4711/intents", typed
    assert nearest_names("nothing of the sort", names) == []

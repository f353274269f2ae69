"""The names of tasks as a caller sees them."""

from pastina.nearest import nearest_names
from pastina.serve.access import matches
from pastina.serve.link import Link

_KEPT = 64  # lists, of callers with different patterns
_LONGEST = 200  # characters of a name that names like it are looked for


class Listing:
    """Names in order, which are sorted again only when a task came or went."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self._kept: dict[tuple[str, ...], tuple[int, list[str]]] = {}

    def names(self, patterns: tuple[str, ...]) -> list[str]:
        """What a caller with these patterns may see; not to be changed."""
        number, names = self._kept.get(patterns, (-1, []))
        if number != self.link.num_changes:
            names = sorted(name for name in self.link.tasks if matches(patterns, name))
            if len(self._kept) >= _KEPT:
                self._kept.clear()
            self._kept[patterns] = (self.link.num_changes, names)
        return names

    def near(self, patterns: tuple[str, ...], name: str) -> list[str]:
        """Names that such a caller may have meant."""
        return nearest_names(name[:_LONGEST], self.names(patterns))

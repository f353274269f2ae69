"""Names beside the points of a picture, where they cover neither each other nor a point."""

from collections.abc import Sequence
from typing import Any

# where a name may stand, as seen from its point, the best place first: dx, dy in points, alignments
_PLACES = [
    (7, 0, "left", "center"),
    (-7, 0, "right", "center"),
    (0, 8, "center", "bottom"),
    (0, -8, "center", "top"),
    (6, 7, "left", "bottom"),
    (6, -7, "left", "top"),
    (-6, 7, "right", "bottom"),
    (-6, -7, "right", "top"),
    (0, 19, "center", "bottom"),
    (0, -19, "center", "top"),
    (0, 30, "center", "bottom"),
    (0, -30, "center", "top"),
]
_POINT = 6  # pixels around a point that no name may cover


def place_labels(panel: Any, points: Sequence[tuple[str, float, float]]) -> None:
    """Write the name of each point (name, x, y) at the first free place around it."""
    from matplotlib.transforms import Bbox

    renderer = panel.figure.canvas.get_renderer()
    panel.figure.draw_without_rendering()  # settles the layout, and so where points are
    centers = panel.transData.transform([(x, y) for _, x, y in points]) if points else []
    taken = [Bbox.from_extents(x - _POINT, y - _POINT, x + _POINT, y + _POINT) for x, y in centers]
    room = panel.get_window_extent(renderer)
    for number, (name, x, y) in enumerate(points):
        others = taken[:number] + taken[number + 1 :]
        label = panel.annotate(
            name,
            (x, y),
            xytext=(0, 0),
            textcoords="offset points",
            fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.4, "alpha": 0.8},
        )
        for dx, dy, horizontal, vertical in _PLACES:
            label.set_position((dx, dy))
            label.set(ha=horizontal, va=vertical)
            box = label.get_window_extent(renderer)
            inside = room.x0 <= box.x0 and box.x1 <= room.x1
            if inside and not any(box.overlaps(other) for other in others):
                break
        taken.append(label.get_window_extent(renderer))

"""Places for the labels of points, so that no label lies on another one or on a point.

Pixels are counted from the top left corner of a plot. A page is as wide as its reader's screen, so
a place must be free at several widths.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

CHARACTER, LINE = 6.8, 13.0
"""Width of a character and height of a line in pixels, a little more than at 11 pixels."""
POINT = 6.0
"""Half the side of the square that a point takes."""
STEP = 5.0
"""Pixels between the dots that stand for a line."""
Place = tuple[float, float, str]
"""Offset of a label from its point, right and down, and its alignment."""
PLACES: tuple[Place, ...] = tuple(
    place
    for far in (0.0, 5.0, 12.0)
    for place in (
        (9.0 + far, 0.0, "left"),
        (-9.0 - far, 0.0, "right"),
        (0.0, -13.0 - far, "center"),
        (0.0, 13.0 + far, "center"),
        (7.0 + far, -10.0 - far, "left"),
        (7.0 + far, 10.0 + far, "left"),
        (-7.0 - far, -10.0 - far, "right"),
        (-7.0 - far, 10.0 + far, "right"),
    )
)
"""The nearest first."""
Point = tuple[float, float]
Line = tuple[Point, Point]


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: "Box") -> bool:
        """Return whether two rectangles have a point in common."""
        across = self.left < other.right and other.left < self.right
        return across and self.top < other.bottom and other.top < self.bottom

    def holds(self, point: Point) -> bool:
        """Return whether a point is inside."""
        return self.left < point[0] < self.right and self.top < point[1] < self.bottom


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A plot of some width and height; both axes go from 0 to 1, the vertical one upwards."""

    width: float
    height: float

    def pixels(self, point: Point) -> Point:
        """Return where a point is, in pixels."""
        return point[0] * self.width, (1.0 - point[1]) * self.height

    def dots(self, lines: Iterable[Line]) -> Iterator[Point]:
        """Yield pixels along lines."""
        for line in lines:
            (x, y), (to_x, to_y) = (self.pixels(end) for end in line)
            steps = 1 + int(max(abs(to_x - x), abs(to_y - y)) / STEP)
            for step in range(steps + 1):
                yield x + (to_x - x) * step / steps, y + (to_y - y) * step / steps

    def box(self, point: Point, text: str, place: Place) -> Box:
        """Return the rectangle of a label."""
        x, y = self.pixels(point)
        width = CHARACTER * len(text)
        left = x + place[0] - {"left": 0.0, "center": width / 2, "right": width}[place[2]]
        middle = y + place[1]
        return Box(left, middle - LINE / 2, left + width, middle + LINE / 2)

    def contains(self, box: Box) -> bool:
        """Return whether a rectangle is inside of the plot."""
        return (
            box.left >= 0 and box.top >= 0 and box.right <= self.width and box.bottom <= self.height
        )


def place_labels(
    points: Sequence[Point], texts: Sequence[str], lines: Sequence[Line], plots: Sequence[Plot]
) -> list[Place | None]:
    """Choose a place for each label, free at all sizes of the plot and off the lines if possible.

    Args:
        points: [N] points, both coordinates from 0 to 1.
        texts: [N] labels; an empty one needs no place.
        lines: lines that a label should not cover.
        plots: the sizes.

    Returns:
        [N] places; None for an empty label, and for one that has no free place.
    """
    taken = [[_around(plot.pixels(point)) for point in points] for plot in plots]
    dots = [list(plot.dots(lines)) for plot in plots]
    places: list[Place | None] = []
    for point, text in zip(points, texts, strict=True):
        free = []
        for rank, place in enumerate(PLACES if text else ()):
            boxes = [plot.box(point, text, place) for plot in plots]
            if all(map(_is_free, boxes, plots, taken)):
                covered = sum(
                    box.holds(dot) for box, of_plot in zip(boxes, dots, strict=True)
                    for dot in of_plot
                )  # fmt: skip
                free.append((covered + rank, place))
        chosen = min(free, key=lambda cost_and_place: cost_and_place[0])[1] if free else None
        places.append(chosen)
        if chosen is not None:
            for plot, boxes_taken in zip(plots, taken, strict=True):
                boxes_taken.append(plot.box(point, text, chosen))
    return places


def _around(point: Point) -> Box:
    return Box(point[0] - POINT, point[1] - POINT, point[0] + POINT, point[1] + POINT)


def _is_free(box: Box, plot: Plot, taken: Sequence[Box]) -> bool:
    return plot.contains(box) and not any(box.meets(other) for other in taken)

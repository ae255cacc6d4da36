"""The layout of a line chart in SVG units; blocks.html.j2 draws it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

COLOURS = ("#2f6fde", "#d1453b", "#12925b", "#a15ccf", "#b5790c", "#0f8b9d", "#7a8290")
DASHES = ("none", "5 3", "1.5 2.5")  # of lines whose colour is taken already
WIDTH, HEIGHT = 340, 190
LEFT, RIGHT, TOP, BOTTOM = 54, WIDTH - 12, 28, HEIGHT - 32  # edges of the plot
KEY_ROW = 14  # height of a row of names below the plot
KEY_MARK, LETTER = 24, 6.2  # width of the mark before a name and the gap behind; of a letter

Points = Sequence[tuple[float, float]]


@dataclass
class Line:
    name: str
    colour: str
    dash: str
    points: list[tuple[float, float]]
    key: tuple[float, float] | None = None  # where its name stands below the plot


@dataclass
class Chart:
    """title; ticks: (y, text); x_labels: (x, text, anchor); guide: (y, text) of a dashed level."""

    title: str
    ticks: list[tuple[float, str]] = field(default_factory=list)
    x_labels: list[tuple[float, str, str]] = field(default_factory=list)
    guide: tuple[float, str] | None = None
    lines: list[Line] = field(default_factory=list)
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = RIGHT
    x_label_y: int = HEIGHT - 16


def lay_out(
    series: Mapping[str, Points],
    title: str,
    x_label: str,
    guide: tuple[str, float] | None,
) -> Chart | None:
    """Place the lines, ticks and labels; None where there is no point."""
    points = [point for line in series.values() for point in line]
    if not points:
        return None
    xs = [x for x, _ in points]
    ys = [y for _, y in points]
    if guide is not None:
        ys.append(guide[1])
    ticks = nice_ticks(min(ys), max(ys))
    x0 = min(xs)
    x_span = max(xs) - x0 or 1
    y0 = min(ticks[0], min(ys))
    y_span = max(ticks[-1], max(ys)) - y0 or 1

    def across(x: float) -> float:
        return LEFT + (x - x0) / x_span * (RIGHT - LEFT)

    def down(y: float) -> float:
        return BOTTOM - (y - y0) / y_span * (BOTTOM - TOP)

    chart = Chart(title)
    chart.ticks = [(down(tick), f"{tick:.4g}") for tick in ticks]
    for x, anchor in ((x0, "start"), (max(xs), "end")):
        text = f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"
        chart.x_labels.append((across(x), text, anchor))
    chart.x_labels.append(((LEFT + RIGHT) / 2, x_label, "middle"))
    if guide is not None:
        name, level = guide
        chart.guide = (down(level), name)
    for number, (name, line) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        dash = DASHES[number // len(COLOURS) % len(DASHES)]
        if line:
            chart.lines.append(Line(name, colour, dash, [(across(x), down(y)) for x, y in line]))
    place_keys(chart, several=len(series) > 1)
    return chart


def place_keys(chart: Chart, several: bool) -> None:
    """Names of the lines below the plot, in as many rows as they need; none where there is one
    series."""
    if not several:
        return
    widest = KEY_MARK + LETTER * max(len(line.name) for line in chart.lines)
    columns = min(len(chart.lines), max(1, int((RIGHT - LEFT) / widest)))
    for number, line in enumerate(chart.lines):
        row, column = divmod(number, columns)
        line.key = (LEFT + column * (RIGHT - LEFT) / columns, HEIGHT - 5 + row * KEY_ROW)
    chart.height += (len(chart.lines) - 1) // columns * KEY_ROW


def nice_ticks(low: float, high: float) -> list[float]:
    """About four round numbers spread over [low, high]."""
    quarter = ((high - low) or abs(high) or 1.0) / 4
    power = 10.0 ** math.floor(math.log10(quarter))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= quarter * 0.999)
    marks = [step * k for k in range(math.floor(low / step), math.floor(high / step) + 2)]
    return [round(m, 10) for m in marks if low - step / 2 <= m <= high + step / 2]

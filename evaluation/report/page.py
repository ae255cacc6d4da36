"""Self-contained HTML pages of results: tables, charts, images; no script, no link to anything
outside the file."""

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

CSS = """
:root { --ink: #1c2330; --soft: #667085; --line: #e4e7ec; --right: #12925b; --wrong: #d1453b }
* { box-sizing: border-box }
body { margin: 0; background: #f7f8fa; color: var(--ink); font: 15px/1.5 system-ui, Roboto, Arial, sans-serif }
main { max-width: 1120px; margin: 0 auto; padding: 40px 28px 64px }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 6px }
h2 { font-size: 19px; margin: 0 0 4px }
h3 { font-size: 15px; margin: 20px 0 8px }
p { margin: 4px 0 14px; color: var(--soft); max-width: 90ch }
section { background: #fff; border: 1px solid var(--line); border-radius: 12px; padding: 22px 24px; margin-top: 20px }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: 7px 14px; text-align: right; border-bottom: 1px solid var(--line) }
th { color: var(--soft); font-weight: 500; font-size: 13px }
th:first-child, td:first-child { text-align: left; padding-left: 0 }
tr:last-child td { border-bottom: 0 }
td.best { font-weight: 650 }
figure { margin: 0 }
figcaption { font-size: 12.5px; color: var(--soft) }
svg { display: block; width: 100%; height: auto }
.grid { display: grid; gap: 16px; grid-template-columns: repeat(auto-fill, minmax(310px, 1fr)) }
.cases { display: grid; gap: 14px; grid-template-columns: repeat(auto-fill, minmax(480px, 1fr)) }
.case { display: flex; gap: 16px; border: 1px solid var(--line); border-radius: 10px; padding: 14px }
.case > div { flex: 1; min-width: 0 }
.case ol { margin: 0; padding: 0; list-style: none; font-size: 13.5px }
.case li { padding: 2px 8px; border-left: 4px solid var(--wrong); margin-bottom: 4px }
.case li.right { border-color: var(--right) }
.case li.other { border-color: var(--line) }
.bar { position: relative; width: 260px; height: 10px; border-radius: 5px; background: #eef1f5 }
.bar i { position: absolute; inset: 0 auto 0 0; border-radius: 5px; background: #2f6fde }
.bar b { position: absolute; top: -3px; bottom: -3px; width: 2px; background: var(--ink) }
.score { float: right; color: var(--soft); font-size: 12px; padding-left: 8px; font-variant-numeric: tabular-nums }
.quote { font-weight: 550; margin: 0 0 10px; color: var(--ink) }
.hits, .words { display: flex; gap: 10px; flex-wrap: wrap; align-items: flex-start; text-align: center }
.thumb { display: block; border-radius: 7px; object-fit: cover }
.frame { border: 4px solid var(--wrong) }
.frame.right { border-color: var(--right) }
.badge { display: inline-block; font-size: 12px; font-weight: 600; padding: 1px 8px; border-radius: 99px; color: #fff;
  background: var(--wrong); margin-bottom: 8px }
.badge.right { background: var(--right) }
footer { color: var(--soft); font-size: 13px; margin-top: 24px }
"""
WAYS = {"txt": "caption", "img": "image"}  # what is found
COLOURS = ("#2f6fde", "#d1453b", "#12925b", "#a15ccf", "#c98a12", "#0f8b9d", "#7a8290")


def page(title: str, sections: Iterable[str], subtitle: str = "", footer: str = "") -> str:
    """The whole HTML document."""
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    lead = f"<h1>{escape(title)}</h1>" + (f"<p>{escape(subtitle)}</p>" if subtitle else "")
    end = f"<footer>{escape(footer)}</footer>" if footer else ""
    style = f"<style>{CSS}</style>"
    body = "\n".join(sections)
    return f'<!doctype html><html lang="en"><head>{head}{style}</head><body><main>{lead}{body}{end}</main></body></html>'


def escape(text: object) -> str:
    """Text that cannot become markup."""
    return html.escape(str(text))


def card(title: str, *blocks: str, intro: str = "") -> str:
    """A titled card of HTML blocks."""
    lead = f"<p>{escape(intro)}</p>" if intro else ""
    return f"<section><h2>{escape(title)}</h2>{lead}{''.join(blocks)}</section>"


def table(
    head: Sequence[str], rows: Iterable[Sequence[object]], best_row: int | None = None
) -> str:
    """A table of text; one row may be set in bold."""
    lines = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"]
    for number, row in enumerate(rows):
        mark = ' class="best"' if number == best_row else ""
        lines.append("<tr>" + "".join(f"<td{mark}>{escape(cell)}</td>" for cell in row) + "</tr>")
    return f"<table>{''.join(lines)}</table>"


def score_table(
    head: Sequence[str], rows: Iterable[tuple[str, float, float | None]], best_row: int | None = 0
) -> str:
    """Names with a score and what chance scores (None = unknown), in percent; a bar of the score,
    marked at chance."""
    lines = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "<th></th></tr>"]
    for number, (name, score, guess) in enumerate(rows):
        mark = ' class="best"' if number == best_row else ""
        cells = "".join(
            f"<td{mark}>{cell}</td>" for cell in (escape(name), *map(_percent, (score, guess)))
        )
        tick = "" if guess is None else f"<b style='left:calc({guess:.1f}% - 1px)'></b>"
        lines.append(
            f"<tr>{cells}<td><div class='bar'><i style='width:{score:.1f}%'></i>{tick}</div></td></tr>"
        )
    return f"<table>{''.join(lines)}</table>"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def recall_table(rows: Mapping[str, Mapping[str, float]], best_row: int | None = 0) -> str:
    """Recalls in percent by row name, each a dict as `evaluation.retrieval.recalls` gives."""
    columns = [
        (f"{way}_r{at}", f"{name} R@{at}") for way, name in WAYS.items() for at in (1, 5, 10)
    ]
    lines = (
        [name, *(f"{row[key]:.1f}" for key, _ in columns), f"{row['r_mean']:.1f}"]
        for name, row in rows.items()
    )
    return table(["recall in %", *(name for _, name in columns), "mean"], lines, best_row)


def image_uri(raw_image: Path | bytes | Tensor, side: int = 96, quality: int = 85) -> str:
    """An image as a data URI: JPEG, `side` pixels per side, aspect not kept (as the networks see
    it).

    image: a file, its bytes, or uint8 [3,H,W].
    """
    from PIL import Image

    if isinstance(raw_image, Tensor):
        image = Image.fromarray(raw_image.permute(1, 2, 0).contiguous().numpy())
    else:
        image = Image.open(
            io.BytesIO(raw_image) if isinstance(raw_image, bytes) else raw_image
        ).convert("RGB")
    buffer = io.BytesIO()
    image.resize((side, side), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def thumbnail(image: Path | bytes | Tensor, side: int = 96, right: bool | None = None) -> str:
    """An <img>, framed green or red where it is right or wrong."""
    frame = "" if right is None else " frame right" if right else " frame"
    uri = image_uri(image, 2 * side)
    return f'<img class="thumb{frame}" width="{side}" height="{side}" alt="" src="{uri}">'


def heat_map(image: Tensor, heat: Tensor, side: int = 192) -> Tensor:
    """uint8 [3,side,side]: the image (uint8 [3,H,W]) under a heat map [h,w] in [0,1], warm where it
    is high."""
    size = {"size": (side, side), "mode": "bilinear", "align_corners": False}
    base = torch.nn.functional.interpolate(image[None].float() / 255, **size)[0]
    level = torch.nn.functional.interpolate(heat[None, None].float(), **size)[0, 0].clamp(0, 1)
    stops = torch.tensor([[0.05, 0.05, 0.35], [0.55, 0.1, 0.5], [0.95, 0.35, 0.2], [1.0, 0.9, 0.3]])
    place = level * (len(stops) - 1)
    low = place.long().clamp(max=len(stops) - 2)
    colour = torch.lerp(stops[low], stops[low + 1], (place - low)[..., None]).permute(2, 0, 1)
    return ((0.45 * base + 0.55 * colour).clamp(0, 1) * 255).byte()


def line_chart(
    series: Mapping[str, Sequence[tuple[float, float]]],
    title: str = "",
    x_label: str = "step",
    guide: tuple[str, float] | None = None,
    width: int = 340,
    height: int = 190,
) -> str:
    """An SVG of lines, each a sequence of (x, y); `guide` is a named dashed level."""
    points = [point for line in series.values() for point in line]
    if not points:
        return ""
    levels = [y for _, y in points] + ([guide[1]] if guide else [])
    x0, x1 = min(x for x, _ in points), max(x for x, _ in points)
    ticks = nice_ticks(min(levels), max(levels))
    y0, y1 = min(ticks[0], min(levels)), max(ticks[-1], max(levels))
    left, right, top, bottom = 54, 12, 28, 32

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x0) / ((x1 - x0) or 1)
        up = (y - y0) / ((y1 - y0) or 1)
        return left + across * (width - left - right), height - bottom - up * (
            height - top - bottom
        )

    parts = [
        f'<text x="{left}" y="16" font-size="12.5" font-weight="600" fill="#1c2330">{escape(title)}</text>'
    ]
    for tick in ticks:
        _, y = place(x0, tick)
        parts.append(
            f'<line x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e4e7ec"/>'
        )
        parts.append(_label(left - 6, y + 3.5, f"{tick:.4g}", "end"))
    for x, anchor in ((x0, "start"), (x1, "end")):
        parts.append(
            _label(
                place(x, y0)[0], height - 16, f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}", anchor
            )
        )
    parts.append(_label((left + width - right) / 2, height - 16, x_label, "middle"))
    if guide:
        _, y = place(x0, guide[1])
        dash = 'stroke="#98a2b3" stroke-dasharray="4 4"'
        parts.append(f'<line x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}" {dash}/>')
        parts.append(_label(width - right, y - 4, guide[0], "end"))
    for number, (name, line) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in line)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8"/>'
        )
        if len(series) > 1:
            x = left + 4 + number * (width - left - right) / len(series)
            parts.append(f'<circle cx="{x:.0f}" cy="{height - 5}" r="3.5" fill="{colour}"/>')
            parts.append(_label(x + 7, height - 1.5, name, "start"))
    return f'<figure><svg viewBox="0 0 {width} {height + 2}" font-family="inherit">{"".join(parts)}</svg></figure>'


def _label(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="11" fill="#667085" text-anchor="{anchor}">{escape(text)}</text>'


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers spread over [low, high]."""
    span = (high - low) or abs(high) or 1.0
    raw = span / count
    power = 10.0 ** torch.tensor(raw).log10().floor().item()
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
    marks = (step * k for k in range(int(low // step), int(high // step) + 2))
    return [round(mark, 10) for mark in marks if low - step / 2 <= mark <= high + step / 2]

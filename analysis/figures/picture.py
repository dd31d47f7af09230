"""The heat map as a picture for a dashboard: the same content, drawn pixel by pixel.

Every run has one, and Matplotlib takes about half a second to lay out a hundred labelled rows: a
sweep would spend more on pictures than on everything else around its models.
"""

from __future__ import annotations

import io
from functools import cache

import matplotlib
import numpy as np
from matplotlib.colors import Normalize
from matplotlib.font_manager import FontProperties, findfont
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont

from analysis.figures.style import ABSENT, ACCENT, INK, QUIET, count_ticks, wrap
from analysis.figures.tokens import COLOUR_LABEL, ROW_LABEL, HeatMap, lowest_shown

DPI = 90
WIDTH = 765  # of the picture; this and all below in pixels
MARGIN = 10
ROW = 14
BAR = 14  # width of the colour bar
LEAST = 15 * ROW  # height of all cells: as long as what is written beside them
DOT = 7
SMOOTH = 8  # times finer is the dot drawn before it is scaled down
TITLE, LABEL, CAPTION, SMALL = 13.0, 9.0, 8.5, 7.0  # points


def png(content: HeatMap) -> bytes:
    """A PNG of the heat map, ``WIDTH`` pixels wide."""
    rows = len(content.labels)
    ruler = ImageDraw.Draw(Image.new("L", (1, 1)))
    title = _fit(ruler, content.title, TITLE, bold=True)
    caption = _fit(ruler, content.caption, CAPTION)
    widest = max(ruler.textlength(label, font=_font(SMALL)) for label in content.labels)
    left = MARGIN + 24 + round(widest) + 8
    top = round(MARGIN + _height(ruler, title, TITLE) + 12)
    right = WIDTH - MARGIN - BAR - 74
    bottom = top + max(rows * ROW, LEAST)
    below = bottom + 52
    height = round(below + _height(ruler, caption, CAPTION) + MARGIN)

    picture = Image.new("RGB", (WIDTH, height), "white")
    draw = ImageDraw.Draw(picture)
    draw.multiline_text((MARGIN, MARGIN), title, font=_font(TITLE, bold=True), fill=INK)
    draw.multiline_text((MARGIN, below), caption, font=_font(CAPTION), fill=QUIET)

    colours = matplotlib.colormaps["viridis"]
    lowest = lowest_shown(content.values)
    cells = colours(Normalize(lowest, 0.0)(np.nan_to_num(content.values)), bytes=True)[..., :3]
    cells[~np.isfinite(content.values)] = _rgb(ABSENT)
    box = (left, top, right, bottom)
    _paste(picture, cells, box)
    ladder = colours(np.linspace(1.0, 0.0, 256), bytes=True)[:, None, :3]
    bar = (right + 14, top, right + 14 + BAR, bottom)
    _paste(picture, ladder, bar)

    columns = content.values.shape[1]
    cell = (bottom - top) / rows
    xs = left + (right - left) * np.arange(columns + 1) / columns  # the edges between columns
    ys = top + cell * np.arange(rows + 1)
    for y, label in zip(ys, content.labels, strict=False):
        draw.text((left - 6, y + cell / 2), label, font=_font(SMALL), fill=INK, anchor="rm")
    for number in count_ticks(content.first, int(content.iterations[-1]), most=12):
        x = left + (right - left) * (number - content.first + 0.5) / columns
        draw.line([(x, bottom), (x, bottom + 4)], fill=QUIET)
        draw.text((x, bottom + 6), str(number), font=_font(LABEL), fill=INK, anchor="mt")
    cut = bool((content.values[np.isfinite(content.values)] < lowest).any())
    ticks = [value for value in MaxNLocator(8).tick_values(lowest, 0.0) if lowest <= value <= 0]
    for value in [lowest, *(v for v in ticks if v > 0.9 * lowest)] if cut else ticks:
        y = top + (bottom - top) * value / lowest
        draw.line([(bar[2], y), (bar[2] + 4, y)], fill=QUIET)
        shown = f"{'≤ ' if cut and value == lowest else ''}{value:g}".replace("-", "\u2212")
        draw.text((bar[2] + 7, y), shown, font=_font(LABEL), fill=INK, anchor="lm")
    middle = ((left + right) / 2, bottom + 24)
    draw.text(middle, "Iteration (pass)", font=_font(LABEL), fill=INK, anchor="mt")
    _upright(picture, ROW_LABEL, MARGIN, (top + bottom) // 2)
    _upright(picture, COLOUR_LABEL, WIDTH - MARGIN - 14, (top + bottom) // 2)

    if content.edge is not None:
        ends = np.clip(content.edge - content.first + 0.5, 0, columns)
        places = left + (right - left) * ends / columns
        steps = [(x, y) for x, y in zip(np.repeat(places, 2), np.repeat(ys, 2)[1:-1], strict=True)]
        inside = [step for step in steps if step[0] < right]
        draw.line(inside + steps[len(inside) : len(inside) + 1], fill=ACCENT, width=2)
    dot = _dot()
    for column, row in zip(*content.settled, strict=True):
        centre = (xs[column] + xs[column + 1]) / 2, (ys[row] + ys[row + 1]) / 2
        picture.paste(dot, (round(centre[0] - DOT / 2), round(centre[1] - DOT / 2)), dot)
    target = io.BytesIO()
    picture.save(target, "png", compress_level=3)
    return target.getvalue()


@cache
def _font(points: float, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    face = FontProperties(family="DejaVu Sans", weight="bold" if bold else "normal")
    return ImageFont.truetype(findfont(face), round(points * DPI / 72))


def _fit(ruler: ImageDraw.ImageDraw, text: str, points: float, *, bold: bool = False) -> str:
    """The text in lines that stay within the picture."""
    font, room = _font(points, bold=bold), WIDTH / DPI
    lines = wrap(text, room, size=points)
    while ruler.multiline_textbbox((0, 0), lines, font=font)[2] > WIDTH - 2 * MARGIN and room > 1:
        room *= 0.95
        lines = wrap(text, room, size=points)
    return lines


def _height(ruler: ImageDraw.ImageDraw, text: str, points: float) -> float:
    return ruler.multiline_textbbox((0, 0), text, font=_font(points))[3]


def _rgb(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour.removeprefix("#")))


def _paste(picture: Image.Image, colours: np.ndarray, box: tuple[int, int, int, int]) -> None:
    """(rows, columns, 3) colours, each a rectangle, filling ``box`` (left, top, right, bottom)."""
    size = (box[2] - box[0], box[3] - box[1])
    image = Image.fromarray(np.ascontiguousarray(colours))
    picture.paste(image.resize(size, Image.Resampling.NEAREST), box)


def _upright(picture: Image.Image, text: str, x: int, middle: int) -> None:
    """Text that reads upwards, from ``x`` on and about ``middle``."""
    font = _font(LABEL)
    box = font.getbbox(text)
    strip = Image.new("RGB", (int(box[2]) + 2, int(box[3]) + 2), "white")
    ImageDraw.Draw(strip).text((0, 0), text, font=font, fill=INK)
    turned = strip.rotate(90, expand=True)
    picture.paste(turned, (x, middle - turned.height // 2))


@cache
def _dot() -> Image.Image:
    fine = DOT * SMOOTH
    dot = Image.new("RGBA", (fine, fine), (0, 0, 0, 0))
    edge = (SMOOTH // 2, SMOOTH // 2, fine - SMOOTH // 2, fine - SMOOTH // 2)
    ImageDraw.Draw(dot).ellipse(edge, fill="white", outline=INK, width=SMOOTH)
    return dot.resize((DOT, DOT), Image.Resampling.BOX)

"""A screen of the dashboard as a picture: SVG or PNG by the suffix, the same in any viewer.

Braille, blocks and lines are drawn as shapes, and each run of letters gets exactly the width of its cells, so no
particular font is needed. SVG names only the generic monospace family; PNG uses DejaVu Sans Mono, which Matplotlib
brings along.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from PIL import Image, ImageDraw, ImageFont
from rich.cells import cell_len
from rich.color import Color as RichColor
from rich.style import Style
from textual.app import App

from affmae_cli.dashboard.text import one_line
from affmae_engine import atomic
from affmae_engine.errors import ConfigError

SUFFIXES = (".svg", ".png")
_WIDTH, _HEIGHT = 10, 20  # of a cell, in pixels
_DOT = 1.5  # radius of a braille dot
_LINE = 1.4  # width of a line
_BRAILLE_BITS = {
    (0, 0): 0x01,
    (0, 1): 0x02,
    (0, 2): 0x04,
    (1, 0): 0x08,
    (1, 1): 0x10,
    (1, 2): 0x20,
    (0, 3): 0x40,
    (1, 3): 0x80,
}
_ARMS = {  # light lines by the sides of the cell that they reach
    "─": "lr", "━": "lr", "┈": "lr", "│": "tb", "└": "tr", "┘": "tl", "┌": "br", "┐": "bl", "┤": "tbl", "├": "tbr",
    "┬": "blr", "┴": "tlr", "┼": "tblr", "╭": "br", "╮": "bl", "╰": "tr", "╯": "tl", "┃": "tb",
}  # fmt: skip

Rgb = tuple[int, int, int]


@dataclass(frozen=True)
class Shape:
    """A rectangle (x, y, width, height) or a dot (center, radius) or text in cells from x on."""

    kind: str
    color: Rgb
    place: tuple[float, ...]
    text: str = ""
    bold: bool = False


def check_suffix(out: Path) -> None:
    """Raises ConfigError when the suffix of a file is neither .svg nor .png."""
    if out.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"{out}: the suffix decides what is written, .svg or .png", "for example --export screen.png")


def save_screen(app: App[Any], out: Path, size: tuple[int, int]) -> None:
    """Save what the application shows. size: its (columns, rows).

    Raises:
        ResourceError: the file cannot be written.
    """
    width, height = size[0] * _WIDTH, size[1] * _HEIGHT
    found = list(_shapes(app, size))
    if out.suffix.lower() == ".png":
        picture = _drawn(found, width, height)
        atomic.commit_file(out, lambda partial: picture.save(partial, format="PNG"))
    else:
        atomic.commit_text(out, _svg(found, width, height))


def _shapes(app: App[Any], size: tuple[int, int]) -> Iterator[Shape]:
    """Everything on the screen, row by row: backgrounds, then what stands on them."""
    variables = app.theme_variables
    ground = RichColor.parse(variables["background"]).get_truecolor()
    text = RichColor.parse(variables["foreground"]).get_truecolor()
    yield Shape("box", (ground[0], ground[1], ground[2]), (0, 0, size[0] * _WIDTH, size[1] * _HEIGHT))
    for row, strip in enumerate(app.screen._compositor.render_strips()):
        column, y, over = 0, row * _HEIGHT, []
        for segment in strip:
            style = segment.style or Style()
            front = _rgb(style.color, (text[0], text[1], text[2]))
            back = _rgb(style.bgcolor, (ground[0], ground[1], ground[2]))
            if style.reverse:
                front, back = back, front
            if style.dim:
                front = _mixed(front, back)
            cells = cell_len(segment.text)
            if back != (ground[0], ground[1], ground[2]):
                yield Shape("box", back, (column * _WIDTH, y, cells * _WIDTH, _HEIGHT))
            over += _foreground(segment.text, column, y, front, back, bool(style.bold))
            column += cells
        yield from over


def _foreground(text: str, column: int, y: int, color: Rgb, back: Rgb, bold: bool) -> list[Shape]:
    """The characters of a segment as shapes, runs of letters as text."""
    found, letters, begin = [], "", column
    for char in text:
        shapes = None if char == " " and letters else _glyph(char, column * _WIDTH, y, color, back)
        if shapes is None:
            begin = column if not letters else begin
            letters += char
        else:
            if letters.strip():
                found.append(Shape("text", color, (begin * _WIDTH, y, cell_len(letters) * _WIDTH), letters, bold))
            letters = ""
            found += shapes
        column += cell_len(char)
    if letters.strip():
        found.append(Shape("text", color, (begin * _WIDTH, y, cell_len(letters) * _WIDTH), letters, bold))
    return found


def _glyph(char: str, x: float, y: float, color: Rgb, back: Rgb) -> list[Shape] | None:
    """A character that is drawn as shapes; None for a letter."""
    code = ord(char)
    w, h = _WIDTH, _HEIGHT
    if char == " ":
        return []
    if 0x2800 <= code <= 0x28FF:
        dots = [at for at, bit in _BRAILLE_BITS.items() if (code - 0x2800) & bit]
        return [Shape("dot", color, (x + w * (1 + 2 * c) / 4, y + h * (1 + 2 * r) / 8, _DOT)) for c, r in dots]
    if char == "▀":
        return [Shape("box", color, (x, y, w, h / 2))]
    if 0x2581 <= code <= 0x2588:  # lower eighths
        part = (code - 0x2580) / 8 * h
        return [Shape("box", color, (x, y + h - part, w, part))]
    if 0x2589 <= code <= 0x258F:  # left eighths
        return [Shape("box", color, (x, y, w * (0x2590 - code) / 8, h))]
    if char == "▐":
        return [Shape("box", color, (x + w / 2, y, w / 2, h))]
    if char == "▔":
        return [Shape("box", color, (x, y, w, h / 8))]
    if char == "░":
        return [Shape("box", _mixed(color, back, 0.25), (x, y, w, h))]
    if char in "■◆●":
        if char == "●":
            return [Shape("dot", color, (x + w / 2, y + h / 2, 4))]
        return [Shape("box" if char == "■" else "diamond", color, (x + 1, y + h / 2 - 4, 8, 8))]
    arms = _ARMS.get(char)
    if arms is None:
        return None
    middle_x, middle_y, half = x + w / 2, y + h / 2, _LINE / 2
    if char == "━":
        return [Shape("box", color, (x, middle_y - 3, w, 6))]
    if char == "┈":
        return [Shape("box", color, (x + w * k / 4 + 0.5, middle_y - half / 2, 1.2, half)) for k in range(4)]
    ends = {
        "l": (x, middle_y - half, w / 2 + half, _LINE), "r": (middle_x - half, middle_y - half, w / 2 + half, _LINE),
        "t": (middle_x - half, y, _LINE, h / 2 + half), "b": (middle_x - half, middle_y - half, _LINE, h / 2 + half),
    }  # fmt: skip
    return [Shape("box", color, ends[arm]) for arm in arms]


def _svg(shapes: list[Shape], width: int, height: int) -> str:
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">',
        '<g shape-rendering="crispEdges">',
    ]
    lines += [_svg_shape(shape) for shape in shapes if shape.kind == "box"]
    lines.append(f'</g><g font-family="monospace" font-size="{_HEIGHT * 0.8:g}" xml:space="preserve">')
    lines += [_svg_shape(shape) for shape in shapes if shape.kind != "box"]
    return "\n".join([*lines, "</g>", "</svg>\n"])


def _svg_shape(shape: Shape) -> str:
    fill = "#{:02x}{:02x}{:02x}".format(*shape.color)
    if shape.kind == "box":
        x, y, w, h = shape.place
        return f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" fill="{fill}"/>'
    if shape.kind == "dot":
        x, y, r = shape.place
        return f'<circle cx="{x:g}" cy="{y:g}" r="{r:g}" fill="{fill}"/>'
    if shape.kind == "diamond":
        points = " ".join(f"{x:g},{y:g}" for x, y in _diamond(shape.place))
        return f'<polygon points="{points}" fill="{fill}"/>'
    x, y, w = shape.place
    bold = ' font-weight="bold"' if shape.bold else ""
    text = escape(one_line(shape.text)).replace(" ", "&#160;")
    return (
        f'<text x="{x:g}" y="{y + _HEIGHT * 0.76:g}" textLength="{w:g}" lengthAdjust="spacingAndGlyphs" '
        f'fill="{fill}"{bold}>{text}</text>'
    )


def _drawn(shapes: list[Shape], width: int, height: int) -> Image.Image:
    """The picture, drawn at twice its size and kept so: sharp on any display."""
    scale = 2
    picture = Image.new("RGB", (width * scale, height * scale))
    draw = ImageDraw.Draw(picture)
    fonts = {bold: _font("DejaVuSansMono-Bold.ttf" if bold else "DejaVuSansMono.ttf", scale) for bold in (False, True)}
    for shape in shapes:
        if shape.kind == "box":
            x, y, w, h = (value * scale for value in shape.place)
            draw.rectangle(
                (round(x), round(y), max(round(x), round(x + w) - 1), max(round(y), round(y + h) - 1)), shape.color
            )
        elif shape.kind == "dot":
            x, y, r = (value * scale for value in shape.place)
            draw.ellipse((x - r, y - r, x + r, y + r), shape.color)
        elif shape.kind == "diamond":
            draw.polygon([(x * scale, y * scale) for x, y in _diamond(shape.place)], shape.color)
        else:
            x, y, _ = shape.place
            for char in shape.text:  # each in its cell, whatever width the font gives it
                if not char.isspace():
                    middle = x + _WIDTH * cell_len(char) / 2
                    at = middle * scale, (y + _HEIGHT * 0.78) * scale
                    draw.text(at, char, shape.color, fonts[shape.bold], anchor="ms")
                x += _WIDTH * cell_len(char)
    return picture


def _diamond(place: tuple[float, ...]) -> list[tuple[float, float]]:
    x, y, w, h = place
    return [(x + w / 2, y), (x + w, y + h / 2), (x + w / 2, y + h), (x, y + h / 2)]


def _font(name: str, scale: int) -> ImageFont.FreeTypeFont:
    found = importlib.util.find_spec("matplotlib")
    folder = Path(found.origin).parent if found is not None and found.origin else Path()
    return ImageFont.truetype(str(folder / "mpl-data" / "fonts" / "ttf" / name), round(_HEIGHT * 0.8 * scale))


def _rgb(color: RichColor | None, otherwise: Rgb) -> Rgb:
    if color is None or color.is_default:
        return otherwise
    found = color.get_truecolor()
    return found[0], found[1], found[2]


def _mixed(front: Rgb, back: Rgb, share: float = 0.6) -> Rgb:
    r, g, b = (round(share * a + (1 - share) * c) for a, c in zip(front, back, strict=True))
    return r, g, b

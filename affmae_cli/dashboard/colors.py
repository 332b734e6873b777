"""Themes, and one color for each curve and class, the same in every chart, bar and picture.

Curves have Okabe and Ito's colors (2008), which color-blind people can tell apart; classes have those of the pictures
(`affmae_engine.class_colors`). A color that would be hard to see on the background is mixed with the text's color.
"""

from __future__ import annotations

from textual.color import Color
from textual.theme import Theme

from affmae_engine.class_colors import class_colour

BLUE, ORANGE, GREEN, PINK, YELLOW, RED = "#56B4E9", "#E69F00", "#2FB592", "#CC79A7", "#F0E442", "#E4713C"
PALETTE = (BLUE, ORANGE, GREEN, PINK, YELLOW, RED)
"""Colors of curves without one of their own, such as those of several runs or GPUs."""
CURVES = {
    "held-out": ORANGE,
    "loss": BLUE,
    "last": GREEN,
    "step2": PINK,
    "step1": YELLOW,
    "focal": GREEN,
    "dice": YELLOW,
    "iou": BLUE,
    "memory": BLUE,
    "load": GREEN,
    "power": ORANGE,
    "temperature": RED,
    "clock": PINK,
    "images_per_s": GREEN,
    "data_wait": ORANGE,
}
_CONTRAST = 3.0
"""Contrast ratio to the background that thin lines need (WCAG 2.1, non-text)."""

DARK = Theme(
    name="affmae-dark",
    primary=BLUE,
    secondary=PINK,
    accent=ORANGE,
    success=GREEN,
    warning=ORANGE,
    error="#F0703A",
    foreground="#DDE3E8",
    background="#0F1418",
    surface="#151C22",
    panel="#1D272F",
    dark=True,
    variables={"rule": "#33424D", "footer-key-foreground": BLUE},
)
LIGHT = Theme(
    name="affmae-light",
    primary="#0072B2",
    secondary="#A8487F",
    accent="#B35900",
    success="#00805C",
    warning="#B35900",
    error="#C03A00",
    foreground="#1B2126",
    background="#FBFCFD",
    surface="#F2F5F7",
    panel="#E4EAEE",
    dark=False,
    variables={"rule": "#C3CCD3", "footer-key-foreground": "#0072B2"},
)


def curve_color(name: str, number: int = 0) -> str:
    """The color of a curve by the name of its column; `number` picks one from the palette for others."""
    return CURVES.get(name, PALETTE[number % len(PALETTE)])


def class_color(number: int) -> str:
    """The color of class `number` in pictures, as #RRGGBB."""
    return Color(*class_colour(number)).hex


def readable(color: str, background: Color, foreground: Color) -> Color:
    """`color`, mixed with the color of text as far as it takes to be seen on the background."""
    found = Color.parse(color)
    for tenth in range(10):
        mixed = found.blend(foreground, tenth / 10)
        if _contrast(mixed, background) >= _CONTRAST:
            return mixed
    return foreground


def _contrast(a: Color, b: Color) -> float:
    low, high = sorted((_luminance(a), _luminance(b)))
    return (high + 0.05) / (low + 0.05)


def _luminance(color: Color) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color.normalized]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

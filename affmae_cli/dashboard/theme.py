"""The dashboard's two themes, and the colours of curves, which colour-blind readers tell apart (Okabe and Ito 2008).

Each theme orders the palette so that the first colours stand out on its background: yellow is last on white, the deep
blue last on black. Other Textual themes get the colours of the dark or light one by their own darkness.
"""

from __future__ import annotations

from textual.theme import Theme

_ON_DARK = ("#56B4E9", "#E69F00", "#2FB592", "#CC79A7", "#F0E442", "#E4713C")
_ON_LIGHT = ("#0072B2", "#B35900", "#00805C", "#A8487F", "#7A5C00", "#2F2F2F")
_RAW_ON_DARK = ("#2B5A74", "#73500A", "#1B5A49", "#663D54", "#787221", "#72391E")
_RAW_ON_LIGHT = ("#A6CCE3", "#E5C7A6", "#A6D2C6", "#DFBED0", "#D2C8A6", "#B9B9B9")


def series_variables(*, dark: bool) -> dict[str, str]:
    """Stylesheet variables: `rule` for thin lines, the curves' `series-0` and so on, `raw-0` and so on behind them."""
    series, raw = (_ON_DARK, _RAW_ON_DARK) if dark else (_ON_LIGHT, _RAW_ON_LIGHT)
    return {
        "rule": "#33424D" if dark else "#C3CCD3",
        **{f"series-{i}": colour for i, colour in enumerate(series)},
        **{f"raw-{i}": colour for i, colour in enumerate(raw)},
    }


DARK = Theme(
    name="affmae-dark",
    primary="#56B4E9",
    secondary="#CC79A7",
    accent="#E69F00",
    success="#2FB592",
    warning="#E69F00",
    error="#F0703A",
    foreground="#DDE3E8",
    background="#0F1418",
    surface="#151C22",
    panel="#1D272F",
    dark=True,
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
)

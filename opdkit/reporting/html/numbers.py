"""Numbers as a reader wants them: few digits, round ticks, a dash for what is unknown."""

from __future__ import annotations

import math
import sys

UNKNOWN = "-"
MOST_CHARACTERS = 50_000  # of one text on a page; Chromium is busy for minutes with a million in a phone's width


def known(value: object) -> float | None:
    """A finite number of a file that anybody may have written, or None."""
    return float(value) if isinstance(value, (int, float)) and abs(value) <= sys.float_info.max else None


def score(value: float | None) -> str:
    """A share or reward: three decimals."""
    return UNKNOWN if value is None else f"{value:.3f}"


def compact(value: float | None) -> str:
    """Any quantity: about four significant digits, thousands separated, a power of ten in place of many zeros."""
    if value is None:
        return UNKNOWN
    if not math.isfinite(value):
        return f"{value:g}"
    if value == 0 or (value == int(value) and abs(value) < 1e15):
        return f"{int(value):,}"
    if abs(value) < 1e-3 or abs(value) >= 1e15:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    decimals = max(0, 3 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def share(part: float, whole: float) -> str:
    """'12 of 480 (2.5 %)'."""
    percent = 100 * part / whole
    shown = f"{percent:.0f}" if percent >= 10 or percent == 0 else f"{percent:.1f}" if percent >= 0.1 else "< 0.1"
    return f"{part:,.0f} of {whole:,.0f} ({shown} %)"


def ticks(low: float, high: float, *, about: int = 4) -> list[float]:
    """Round values that cover [low, high], in steps of 1, 2, 2.5 or 5 times a power of ten."""
    if high <= low:
        margin = abs(low) * 0.1 or 1.0
        low, high = (0.0, 2 * high) if low > 0 else (low - margin, high + margin)
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def shortened(text: str) -> str:
    """A text for a page: of a very long one the beginning, and how much is left out."""
    left_out = len(text) - MOST_CHARACTERS
    return text if left_out <= 0 else f"{text[:MOST_CHARACTERS]}\n[{left_out:,} more characters are not shown]"

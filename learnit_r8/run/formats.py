"""Numbers, durations and times of day as short text of steady width."""

from __future__ import annotations

import math
import time as clock


def number(value: float, width: int = 0) -> str:
    """Return a number in at most 8 characters, 4 significant digits, right-justified to `width`."""
    return _number(value).rjust(width)


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    size = abs(value)
    if size == 0:
        return "0"
    if size >= 99995 or size < 0.00095:
        return f"{value:.1e}" if value < 0 or size >= 1e100 or size < 1e-99 else f"{value:.2e}"
    places = 4 if size < 1 else 3 if size < 10 else 2 if size < 100 else 1 if size < 1000 else 0
    return f"{value:.{places}f}"


def short(value: float) -> str:
    """Return a number in as few characters as 3 significant digits need: `.0873`, `12.4`, `3.4e-3`, `21k`."""
    if not math.isfinite(value) or value == 0:
        return _number(value)
    size = abs(value)
    if size < 0.0095 or size >= 1e15:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    if size < 0.9995:
        return f"{value:.3f}".replace("0.", ".", 1)
    if size < 999.5:
        return f"{value:.3g}"
    return count(value)


def brief(value: float) -> str:
    """Return a number with 3 significant digits and its leading zero: `0.087`, `0.5`, `12.4`, `3.4e-3`."""
    text = short(value)
    if text.startswith((".", "-.")):
        return text.replace(".", "0.", 1).rstrip("0")
    return text


def signed(value: float, width: int = 0) -> str:
    """Return a number with its sign, right-justified to `width`."""
    return (("+" if value > 0 else "") + _number(value)).rjust(width)


def steps(value: int) -> str:
    """Return a whole number in groups of three: `21 560`."""
    return f"{value:,}".replace(",", " ")


def count(value: float) -> str:
    """Return a large number with a unit: `950`, `21.5k`, `4M`."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9995:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def size(number_of_bytes: float) -> str:
    """Return bytes as `412 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(number_of_bytes) < 999.5:
            return f"{number_of_bytes:.3g} {unit}"
        number_of_bytes /= 1000
    return f"{number_of_bytes:.3g} TB"


def span(seconds: float) -> str:
    """Return a duration in its two largest units: `2h57m`, `21m24s`, `8.0s`, `370ms`."""
    if not math.isfinite(seconds):
        return "--"
    seconds = max(0.0, seconds)
    if seconds < 1:
        return f"{seconds * 1000:.0f}ms"
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    for unit, name, part, part_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= unit:
            return f"{whole // unit}{name}{whole % unit // part:02d}{part_name}"
    return f"{whole}s"


def rough(seconds: float) -> str:
    """Return a duration in whole numbers of its largest unit: `9s`, `4m`, `2h`."""
    if not math.isfinite(seconds):
        return "--"
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size:
            return f"{int(seconds / size)}{unit}"
    return f"{int(max(0.0, seconds))}s"


def stopwatch(seconds: float) -> str:
    """Return a duration as `02:14:07`, with days before it where there are any."""
    whole = int(max(0.0, seconds)) if math.isfinite(seconds) else 0
    days, rest = divmod(whole, 86400)
    text = f"{rest // 3600:02d}:{rest % 3600 // 60:02d}:{rest % 60:02d}"
    return f"{days}d {text}" if days else text


def milliseconds(seconds: float) -> str:
    """Return a step's share: `373ms`, `8.1ms`, `4.21s`."""
    if not math.isfinite(seconds):
        return "--"
    value = seconds * 1000
    if value >= 9999.5:
        return f"{seconds:.1f}s"
    return f"{value:.0f}ms" if value >= 99.5 else f"{value:.1f}ms"


def of_day(time: float, utc_offset: int | None, pattern: str = "%H:%M:%S") -> str:
    """Return a wall-clock time as text; without seconds ahead of UTC, in the machine's zone."""
    try:
        parts = clock.localtime(time) if utc_offset is None else clock.gmtime(time + utc_offset)
    except (ValueError, OverflowError, OSError):
        return "--:--:--"
    return clock.strftime(pattern, parts)


def sample(called: int | str, most: int) -> str:
    """Return a sample's id or key in so many characters, the end of a long one: of a path it tells most."""
    text = str(called)
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= most else f"…{text[1 - most :]}"

"""How numbers become cells of tables."""

from __future__ import annotations

from afmrl_ray.report.estimate import Estimate


def format_percent(value: Estimate | None) -> str:
    """A fraction as per cent with half the width of its interval, e.g. `35.4 ± 1.0`; empty if it was not measured."""
    return format_mean(value, 100.0, 1)


def format_mean(value: Estimate | None, scale: float, digits: int, sign: str = "") -> str:
    """`mean ± half the width of the interval`, both multiplied by `scale`; empty if it was not measured.

    Args:
        sign: `+` = positive means have a plus sign.
    """
    if value is None or value.mean is None:
        return ""
    text = f"{scale * value.mean:{sign}.{digits}f}"
    if value.low is None or value.high is None:
        return text
    return f"{text} ± {scale * (value.high - value.low) / 2:.{digits}f}"


def format_points(value: Estimate | None) -> str:
    """A difference of fractions in percentage points with its interval, e.g. `+14.3 [+11.3, +17.3]`."""
    if value is None or value.mean is None:
        return ""
    text = f"{100 * value.mean:+.1f}"
    if value.low is None or value.high is None:
        return text
    return f"{text} [{100 * value.low:+.1f}, {100 * value.high:+.1f}]"


def format_duration(seconds: float) -> str:
    """`48 s`, `12 min 5 s` or `3 h 20 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"

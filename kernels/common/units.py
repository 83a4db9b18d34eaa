"""Numbers as a person reads them."""

from __future__ import annotations


def human(number: float) -> str:
    """Return a number with three digits and a suffix: 2.62M, 15.3G."""
    for suffix in ("", "k", "M", "G", "T", "P", "E"):
        if abs(number) < 999.5 or suffix == "E":
            return f"{number:.3g}{suffix}"
        number /= 1000
    raise AssertionError("the last suffix has no upper limit")


def duration(seconds: float) -> str:
    """Return seconds as 4.2s, 3m 20s or 2h 05m, and what is above 48 hours as 15.2 days; "unknown" for no duration."""
    if not 0 <= seconds < 1e18:
        return "unknown"
    if seconds < 59.95:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m {rest:02d}s"
    if minutes <= 48 * 60:
        return f"{minutes // 60}h {minutes % 60:02d}m"
    return f"{seconds / 86400:,.1f} days"

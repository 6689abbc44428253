"""How the dashboard writes numbers, times and states.  Jinja filters; pure functions."""

from __future__ import annotations

from datetime import UTC, datetime

from markupsafe import Markup


def age(seconds: float | None) -> str:
    """Write a duration coarsely: 8 s, 12 min, 3 h, 5 d."""
    if seconds is None:
        return "–"
    seconds = max(0.0, seconds)
    for limit, unit, size in ((60, "s", 1), (3600, "min", 60), (86400, "h", 3600)):
        if seconds < limit:
            return f"{int(seconds // size)} {unit}"
    return f"{int(seconds // 86400)} d"


def utc(at_s: float | None) -> str:
    """Write a time as UTC, to the second."""
    return "–" if at_s is None else datetime.fromtimestamp(at_s, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def iso(at_s: float) -> str:
    """Write a time for a `datetime` attribute."""
    return datetime.fromtimestamp(at_s, UTC).isoformat(timespec="seconds")


def ratio(value: float | None) -> str:
    """Write an acceptance with three decimals."""
    return "–" if value is None else f"{value:.3f}"


def interval(bounds: tuple[float, float] | list[float] | None) -> str:
    """Write an interval in brackets."""
    return "" if bounds is None else f"[{bounds[0]:.3f}, {bounds[1]:.3f}]"


def count(value: int | None) -> str:
    """Write a whole number with thin thousands."""
    return "–" if value is None else f"{value:,}".replace(",", " ")


def size(value: int | None) -> str:
    """Write bytes as KB or MB."""
    if value is None:
        return "–"
    return f"{value / 1e6:.1f} MB" if value >= 1e6 else f"{value / 1e3:.0f} KB"


def version(value: int | None) -> str:
    """Write a version; the base draft says so."""
    return "–" if value is None else f"v{value}"


def code(text: str) -> Markup:
    """Show what stands between backticks as code; the rest is escaped."""
    parts = text.split("`")
    return Markup("").join(Markup("<code>{}</code>").format(part) if i % 2 else part for i, part in enumerate(parts))


FILTERS = {
    "code": code,
    "age": age,
    "utc": utc,
    "iso": iso,
    "ratio": ratio,
    "interval": interval,
    "count": count,
    "size": size,
    "version": version,
}

"""Counts and sizes as people read them: three digits and a unit."""


def count_text(value: float) -> str:
    """A number of things: 671B, 37.6B, 576."""
    return _scaled(value, ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")))


def bytes_text(value: float) -> str:
    """A number of bytes in decimal units: 1.02 GB, 12 B."""
    return _scaled(value, ((1e12, " TB"), (1e9, " GB"), (1e6, " MB"), (1e3, " kB"))) + ("" if value >= 1e3 else " B")


def _scaled(value: float, units) -> str:
    for size, unit in units:
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}" if value / size < 999.5 else f"{value / size:.0f}{unit}"
    return f"{value:.3g}"

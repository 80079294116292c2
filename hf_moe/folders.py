"""Folders to write to, looked at before long work."""

import os
from pathlib import Path


def why_not_writable(folder: Path) -> str | None:
    """What keeps a folder from being made or written to, as the rest of a sentence; `None`: nothing that shows."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        return f"{place} is a file, not a folder."
    if not os.access(place, os.W_OK | os.X_OK) or os.statvfs(place).f_flag & os.ST_RDONLY:
        return f"{place} cannot be written to. Name another folder."
    return None

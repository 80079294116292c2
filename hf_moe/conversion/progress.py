"""Progress of a conversion: a bar on a terminal, a line now and then elsewhere."""

import sys
import threading
import time

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from ..units import bytes_text

_LINE_SECONDS = 10.0


def human_seconds(seconds: float) -> str:
    """A duration: `2:05:09` or `0:42`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class ProgressDisplay:
    """Bytes, rate and time left. `advance` may be called from any thread.

    `rich` bars where standard error is a terminal; otherwise a line every ten seconds, which logs can hold.
    """

    def __init__(self, title: str, total: int, enabled: bool = True):
        self.title, self.total, self.enabled = title, total, enabled
        self.done = self.skipped = 0
        self.started = self.shown = time.monotonic()
        self.lock = threading.Lock()
        self.bar: Progress | None = None
        console = Console(stderr=True, markup=False)
        if enabled and console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
            self.bar = Progress(*columns, TimeRemainingColumn(), console=console)
            self.task = self.bar.add_task(title, total=total)

    def __enter__(self) -> "ProgressDisplay":
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *exception) -> None:
        if self.bar is not None:
            self.bar.stop()

    def skip(self, count: int) -> None:
        """Bytes that need not be written again."""
        self.skipped += count
        if self.bar is not None:
            self.bar.update(self.task, total=self.total - self.skipped)

    def advance(self, count: int) -> None:
        """Bytes that have been written."""
        with self.lock:
            self.done += count
            if self.bar is not None:
                self.bar.update(self.task, completed=self.done)
            elif self.enabled and time.monotonic() - self.shown >= _LINE_SECONDS:
                self.shown = time.monotonic()
                self._line()

    def _line(self) -> None:
        rate = self.done / max(time.monotonic() - self.started, 1e-9)
        total = self.total - self.skipped
        left = human_seconds((total - self.done) / max(rate, 1e-9))
        shares = f"{bytes_text(self.done)} of {bytes_text(total)}, {bytes_text(rate)}/s, {left} left"
        print(f"{self.title}: {shares}", file=sys.stderr, flush=True)

    def say(self, message: str) -> None:
        """A line beside the bar."""
        if self.bar is not None:
            self.bar.console.print(message, highlight=False, soft_wrap=True)
        elif self.enabled:
            print(message, file=sys.stderr, flush=True)

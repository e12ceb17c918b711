"""Progress bars for whatever takes more than a second; none on a quiet run or off a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

from rich import progress as rich_progress
from rich.console import Console, RenderableType
from rich.text import Text

DELAY = 1.0
"""Seconds before a task is shown, so that nothing flickers by."""

DisplayFactory = Callable[[], rich_progress.Progress]
"""Makes a progress display, or returns the one that is already on the screen."""

Progress = Callable[[Iterable[Any], str], Iterable[Any]]
"""Iterates over items beside a bar with a name; what long loops take as an option."""


def no_progress(items: Iterable[Any], what: str) -> Iterable[Any]:
    """Return `items`: a `Progress` without a bar."""
    return items


class Display(rich_progress.Progress):
    """A display on standard error that may be entered again while it is shown.

    Passes open a display of their own inside the one of the command that runs them; both are this
    object, since two live displays cannot share a terminal. What finished disappears.

    Parameters
    ----------
    console
        Where to show it; standard error by default.
    delay
        Seconds before a task is shown.
    """

    def __init__(self, console: Console | None = None, delay: float = DELAY) -> None:
        self._depth = 0
        self._delay = delay
        super().__init__(
            rich_progress.SpinnerColumn(),
            rich_progress.TextColumn("{task.description}"),
            rich_progress.BarColumn(bar_width=24),
            _Count(),
            rich_progress.TimeElapsedColumn(),
            console=console or Console(stderr=True),
            transient=True,
        )

    def start(self) -> None:
        """Show the display, unless it is shown already."""
        self._depth += 1
        if self._depth == 1:
            super().start()

    def stop(self) -> None:
        """Drop finished tasks, and the display with the outermost of its users."""
        if self._depth == 0:
            return
        self._depth -= 1
        for task in self.tasks:
            if task.finished or not self._depth:
                self.remove_task(task.id)
        if self._depth == 0:
            super().stop()

    def get_renderables(self) -> Iterator[RenderableType]:
        """Return a table of the tasks that have run for longer than the delay."""
        tasks = [task for task in self.tasks if (task.elapsed or 0.0) >= self._delay]
        yield self.make_tasks_table(tasks)


class _Count(rich_progress.ProgressColumn):
    """``3/10``, or nothing where the total is unknown."""

    def __init__(self) -> None:
        super().__init__()
        self._total_known = rich_progress.MofNCompleteColumn()

    def render(self, task: rich_progress.Task) -> Text:
        return Text() if task.total is None else self._total_known.render(task)


def display_factory(
    *, quiet: bool = False, console: Console | None = None
) -> DisplayFactory | None:
    """Return what makes progress displays, or None where none should be shown.

    Parameters
    ----------
    quiet
        Whether the user asked for none.
    console
        Where to show them; standard error by default. None are shown where it is no terminal.

    Returns
    -------
    callable or None
        Every call returns the same display; the one on standard error is that of the process, so
        that whoever asks for it shares it.
    """
    if quiet or not (console or Console(stderr=True)).is_terminal:
        return None
    if console is None:
        return _shared
    display = Display(console)
    return lambda: display


@contextmanager
def progress_bar(
    progress: DisplayFactory | None, what: str, total: float | None = None
) -> Iterator[Callable[[float], None]]:
    """Show a bar called `what` while a ``with`` runs, which advances it by calling what it gets.

    Parameters
    ----------
    progress
        What makes displays; None for no bar.
    what
        The text beside the bar.
    total
        How far the bar goes; None for work whose length is not known.

    Examples
    --------
    >>> with progress_bar(None, "counting", total=3) as advance:
    ...     for _ in range(3):
    ...         advance(1)
    """
    if progress is None:
        yield _nothing
        return
    with progress() as display:
        task = display.add_task(what, total=total)
        try:
            yield partial(display.advance, task)
        finally:
            if task in display.task_ids:
                display.remove_task(task)


@cache
def _shared() -> Display:
    return Display()


def _nothing(_: float) -> None:
    pass

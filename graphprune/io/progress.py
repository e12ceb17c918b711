"""Progress bars for whatever takes more than a second; none on a quiet run or off a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

DELAY = 1.0
"""Seconds before a task is shown, so that nothing flickers by."""

Maker = Callable[[], Progress]
"""Makes a progress display, or the one that is already on the screen."""


Track = Callable[[Iterable[Any], str], Iterable[Any]]
"""Iterates over items beside a bar with a name; what long loops take as an option."""


def silent(items: Iterable[Any], what: str) -> Iterable[Any]:
    """A `Track` without a bar."""
    return items


class Display(Progress):
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
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            _Count(),
            TimeElapsedColumn(),
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
        """The tasks that have been at it for long enough."""
        tasks = [task for task in self.tasks if (task.elapsed or 0.0) >= self._delay]
        yield self.make_tasks_table(tasks)


class _Count(ProgressColumn):
    """``3/10``, or nothing where the total is unknown."""

    def __init__(self) -> None:
        super().__init__()
        self._counted = MofNCompleteColumn()

    def render(self, task: Task) -> Text:
        return Text() if task.total is None else self._counted.render(task)


def maker(*, quiet: bool = False, console: Console | None = None) -> Maker | None:
    """What makes progress displays, or None where none should be shown.

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
def counted(
    progress: Maker | None, what: str, total: float | None = None
) -> Iterator[Callable[[float], None]]:
    """A bar called `what` for the body of a ``with``, which advances it by calling what it gets.

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
    >>> with counted(None, "counting", total=3) as advance:
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

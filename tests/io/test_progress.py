"""Bars appear on terminals only, only after a while, and may be nested."""

from __future__ import annotations

import io

from rich.console import Console

from graphprune.io.progress import Display, display_factory, progress_bar


def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=80)


def shown(display: Display) -> str:
    console = Console(file=io.StringIO(), width=80)
    console.print(display.get_renderable())
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def test_nothing_is_shown_when_quiet_or_off_a_terminal() -> None:
    assert display_factory(quiet=True, console=terminal()) is None
    assert display_factory(console=Console(file=io.StringIO())) is None
    assert display_factory(console=terminal()) is not None


def test_one_run_has_one_display() -> None:
    make = display_factory(console=terminal())
    assert make is not None
    assert make() is make()


def test_a_task_is_shown_after_the_delay() -> None:
    with Display(terminal(), delay=1e9) as late:
        late.add_task("sorting")
        assert "sorting" not in shown(late)
    with Display(terminal(), delay=0) as early:
        early.add_task("sorting", total=7)
        assert "sorting" in shown(early)
        assert "0/7" in shown(early)


def test_an_inner_user_leaves_the_display_to_the_outer_one() -> None:
    display = Display(terminal(), delay=0)
    with display:
        display.add_task("outer")
        with display:
            assert list(display.track([1, 2], description="inner")) == [1, 2]
            assert "inner" in shown(display)
        assert display.live.is_started
        assert "outer" in shown(display)
        assert "inner" not in shown(display)
    assert not display.live.is_started
    assert not display.tasks


def test_a_display_can_be_used_again() -> None:
    display = Display(terminal(), delay=0)
    for name in ("first", "second"):
        with display:
            display.add_task(name)
            assert name in shown(display)
    assert not display.live.is_started


def test_counted_advances_and_clears_its_bar_even_after_an_error() -> None:
    display = Display(terminal(), delay=0)
    try:
        with progress_bar(lambda: display, "counting", total=3) as advance:
            advance(2)
            assert display.tasks[0].completed == 2
            raise ValueError
    except ValueError:
        pass
    assert not display.tasks
    assert not display.live.is_started


def test_counted_does_without_a_display() -> None:
    with progress_bar(None, "counting") as advance:
        advance(1)

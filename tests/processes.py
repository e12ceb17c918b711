"""Several processes that work together as under torchrun, forked from the one that tests."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

PATIENCE = 120.0
"""Seconds after which processes that wait for each other are ended."""


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit status (negative for a signal), result and what it printed."""

    status: int
    result: Any
    output: str
    errors: str


def together(work: Callable[[], Any], count: int = 2) -> list[Ended]:
    """Run `work` in `count` processes that find each other; a rank is told by its environment.

    What they find each other by is kept here, as torchrun does, so that it outlives them.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = store.port
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder, str(rank)) for rank in range(count)]
        children = [_forked(work, rank, count, port, place) for rank, place in enumerate(places)]
        try:
            statuses = _waited(children)
        finally:
            for child in children:
                if child in _running:
                    os.kill(child, signal.SIGKILL)
        return [_ended(*each) for each in zip(statuses, places, strict=True)]


_running: set[int] = set()


def _forked(work: Callable[[], Any], rank: int, count: int, port: int, place: Path) -> int:
    place.mkdir()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        _running.add(child)
        return child
    status = 1
    try:
        for descriptor, name in ((1, "output"), (2, "errors")):
            os.dup2(os.open(place / name, os.O_WRONLY | os.O_CREAT), descriptor)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        os.environ |= {
            "RANK": str(rank),
            "WORLD_SIZE": str(count),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": "lo",
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        (place / "result").write_bytes(pickle.dumps(work()))
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - it must not come to whoever forked it
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _waited(children: list[int]) -> list[int]:
    """Return the exit status of each; whoever is left when one has failed is told to end."""
    found: dict[int, int] = {}
    began, told = time.monotonic(), False
    while len(found) < len(children):
        for child in set(children) - set(found):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                found[child] = os.waitstatus_to_exitcode(status)
                _running.discard(child)
        if not told and any(found.values()):
            told = True
            for child in set(children) - set(found):
                os.kill(child, signal.SIGTERM)  # as torchrun does
        assert time.monotonic() - began < PATIENCE, "processes wait for each other"
        time.sleep(0.01)
    return [found[child] for child in children]


def _ended(status: int, place: Path) -> Ended:
    result = place / "result"
    return Ended(
        status,
        pickle.loads(result.read_bytes()) if result.exists() else None,
        (place / "output").read_text(),
        (place / "errors").read_text(),
    )

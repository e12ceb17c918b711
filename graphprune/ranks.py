"""Several processes that do one piece of work together, as torchrun starts them.

All run the same code and come to the same decisions. What is done for each sample is divided among
them (`own`) and added up (`sum_of`), what is solved is solved by one of them (`each_once`), and
what others see (files, tables, one line for an error) comes from the first. A process that is by
itself is the first of one: nothing here then costs anything, and torch.distributed is not needed.
"""

from __future__ import annotations

import hashlib
import io
import os
import signal
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import accumulate
from typing import TYPE_CHECKING, Any, TypeVar

from graphprune.errors import ProcessError, first_line

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
J = TypeVar("J")

TERMINATED = 128 + signal.SIGTERM
"""Exit status of a process that was told to end, by the custom of shells."""

_ENVIRONMENT = "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"
"""What torchrun tells every process that it starts."""

_FINDING = timedelta(minutes=10)
"""For how long processes look for each other."""

_TOGETHER = 2**26
"""Bytes of tensors that are sent at once, since they are copied to be."""

_GLANCE = 2e-4
"""Seconds from one look to the next whether others have sent what is waited for."""


@dataclass
class _Group:
    """The processes that this one works with."""

    rank: int
    size: int
    store: Any
    alone: bool = False


_group: _Group | None = None
_told_to_end = False


def size() -> int:
    """Return how many processes divide the work."""
    return 1 if _group is None or _group.alone else _group.size


def rank() -> int:
    """Return which of them this is, from 0."""
    return 0 if _group is None else _group.rank


def is_first() -> bool:
    """Return whether this process is the one that prints and writes."""
    return rank() == 0


@contextmanager
def joined(arguments: Sequence[str]) -> Iterator[None]:
    """Work with the other processes that torchrun started; by oneself where it started none.

    Parameters
    ----------
    arguments
        What the work is; it must be the same for all.

    Raises
    ------
    ProcessError
        When the processes do not find each other, or were started with different arguments.
    """
    global _group
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or not all(map(os.environ.get, _ENVIRONMENT)):
        yield
        return
    # Read when torch is imported: it would warn, in many lines, of connections to who has ended.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    import torch.distributed as dist

    previous = signal.signal(signal.SIGTERM, _terminated)

    def leave() -> None:
        global _group
        dist.destroy_process_group()  # after a failure it would wait for those that are gone
        _group = None
        signal.signal(signal.SIGTERM, previous)

    _group = _join()
    agree(list(arguments), "ranks were started with different arguments")
    try:
        yield
    except SystemExit as end:
        if not end.code:
            leave()
        raise
    leave()


def _join() -> _Group:
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    local, here = (int(os.environ.get(f"LOCAL_{of}", "0")) for of in ("RANK", "WORLD_SIZE"))
    devices = torch.cuda.device_count()
    if devices:
        torch.cuda.set_device(local % devices)  # what "cuda" means from here on
    # Processes that share a device cannot use nccl.
    backend = "cpu:gloo,cuda:nccl" if devices >= max(here, 1) else "gloo"
    try:
        store, number, count = next(rendezvous("env://", timeout=_FINDING))
        place = f"graphprune {os.environ.get('TORCHELASTIC_RESTART_COUNT', '')}"
        store = dist.PrefixStore(place, store)  # type: ignore[attr-defined]
        store.set(str(number), "here")
        store.wait([str(each) for each in range(count)], _FINDING)
        # Whoever is gone is noticed at once; the others may write, or compute, for hours.
        days = timedelta(days=30)
        dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=days)
    except (RuntimeError, ValueError) as error:
        raise ProcessError(f"the processes do not find each other: {first_line(error)}") from error
    return _Group(number, count, store)


def _terminated(number: int, frame: object) -> None:
    """End as after an interrupt, so that what is half-written is taken back."""
    global _told_to_end
    _told_to_end = True
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise SystemExit(TERMINATED)


def told_to_end() -> bool:
    """Return whether this process was told to end; code that it runs may take that for an error."""
    return _told_to_end


def speaks() -> bool:
    """Return whether this process is the first to fail, and so the one that says why."""
    if _group is None:
        return True
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it is ending
    try:
        return int(_group.store.add("failed", 1)) == 1
    except RuntimeError:  # who keeps the count is gone
        return is_first()


@contextmanager
def undisturbed() -> Iterator[None]:
    """Be told to end only afterwards: what is half-written is then taken back whole."""
    if _group is None:
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def alone() -> Iterator[None]:
    """Do by oneself, in the first process, what the others leave out."""
    if _group is None or _group.alone:
        yield
        return
    _group.alone = True
    try:
        yield
    finally:
        _group.alone = False


# -- dividing --------------------------------------------------------------------------------------


def own(sizes: Sequence[int]) -> range:
    """Return which of some items are this process's: neighbors, about as large as any other's.

    In the order of ranks they are all items in their order.

    Parameters
    ----------
    sizes
        How much work each item is.

    Examples
    --------
    >>> own([5, 5, 3])
    range(0, 3)
    """
    total = max(sum(sizes), 1)
    middles = (end - of / 2 for of, end in zip(sizes, accumulate(sizes), strict=True))
    owners = [min(int(size() * middle / total), size() - 1) for middle in middles]
    return range(bisect_left(owners, rank()), bisect_right(owners, rank()))


def each_once(
    jobs: Sequence[J],
    solve: Callable[[J], T],
    track: Callable[[Sequence[J]], Iterable[J]] = iter,
) -> Iterator[T]:
    """Yield what `solve` gives for every job, each done by one process and sent to all.

    It is pickled on the way; tensors keep their kind of device. One process alone does a job when
    it is asked for what that gives.

    Parameters
    ----------
    jobs
        The same for all.
    solve
        Does one of them.
    track
        Wraps the loop over those of this process in a progress bar.
    """
    if size() == 1:
        yield from (solve(job) for job in track(jobs))
        return
    done = [solve(job) for job in track(jobs[rank() :: size()])]
    found: list[Any] = [None] * len(jobs)
    for owner in range(min(size(), len(jobs))):
        found[owner :: size()] = _sent(owner, done)
    yield from found


def of_first(make: Callable[[], T]) -> T:
    """Return what `make` gives in the first process, to all."""
    if size() == 1:
        return make()
    found: T = _sent(0, make() if is_first() else None)
    return found


def agree(value: object, problem: str) -> None:
    """Refuse to go on where the processes do not hold the same value.

    Raises
    ------
    ProcessError
        Saying `problem`, and which of them hold another value than the first.
    """
    if size() == 1:
        return
    import torch

    digest = hashlib.sha256(repr(value).encode()).digest()
    table = gathered(torch.tensor(list(digest), dtype=torch.uint8))
    others = (table != table[0]).any(1).nonzero().flatten().tolist()
    if others:
        raise ProcessError(f"{problem}: rank {', '.join(map(str, others))} not as rank 0")


# -- collectives -----------------------------------------------------------------------------------


def sum_of(tensors: Iterable[Tensor]) -> None:
    """Add up tensors over all processes, in place.

    All give as many, in one order, of the same shapes and types. They are sent together: how often
    the processes wait for each other does not depend on how many tensors there are.
    """
    if size() == 1:
        return
    import torch

    for together in _bundles(tensors):
        flat = torch.cat([each.flatten() for each in together])
        _add_up(flat)
        parts = flat.split([each.numel() for each in together])
        for each, part in zip(together, parts, strict=True):
            each.copy_(part.view(each.shape))


def padded_sum(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the sums over all processes of tensors whose sizes differ between them.

    What one of them lacks at the ends of dimensions is zero; without dimensions, all of it.
    """
    if size() == 1:
        return list(tensors)
    import torch

    most = max((each.ndim for each in tensors), default=0)
    shapes = [[each.ndim, *each.shape, *[0] * (most - each.ndim)] for each in tensors]
    width = int(gathered(torch.tensor([most])).max())
    own_table = torch.zeros(len(tensors), width + 1, dtype=torch.int64)
    own_table[:, : most + 1] = torch.tensor(shapes, dtype=torch.int64).view(len(tensors), -1)
    whole = gathered(own_table).amax(0).tolist()
    found = []
    for tensor, (ndim, *sizes) in zip(tensors, whole, strict=True):
        wide = tensor.new_zeros(sizes[:ndim])
        if tensor.ndim == ndim:
            wide[tuple(slice(0, each) for each in tensor.shape)] = tensor
        found.append(wide)
    sum_of(found)
    return found


def gathered(tensor: Tensor) -> Tensor:
    """Return the tensors that all processes give, of one shape and type, in order of ranks."""
    if size() == 1:
        return tensor[None]
    table = tensor.new_zeros(size(), *tensor.shape)
    table[rank()] = tensor
    _add_up(table)
    return table


def _bundles(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Yield tensors that are sent together: of one type and device, and not too many bytes."""
    held: dict[object, list[Tensor]] = {}
    for tensor in tensors:
        bundle = held.setdefault((tensor.dtype, tensor.device), [])
        if bundle and sum(each.nbytes for each in bundle) + tensor.nbytes > _TOGETHER:
            yield bundle.copy()
            bundle.clear()
        bundle.append(tensor)
    yield from held.values()


def _add_up(tensor: Tensor) -> None:
    import torch.distributed as dist

    _waited(dist.all_reduce(tensor, async_op=True))


def _sent(owner: int, value: Any) -> Any:
    """Return what the process `owner` gives as `value`, in that process and in all others."""
    import torch
    import torch.distributed as dist

    stream = io.BytesIO()
    if owner == rank():
        torch.save(value, stream)
    data = torch.frombuffer(bytearray(stream.getvalue()) or bytearray(1), dtype=torch.uint8)
    count = torch.tensor([data.numel()])
    _waited(dist.broadcast(count, owner, async_op=True))
    if owner != rank():
        data = data.new_empty(int(count))
    _waited(dist.broadcast(data, owner, async_op=True))
    if owner == rank():
        return value
    stream = io.BytesIO(data.numpy().tobytes())
    return torch.load(stream, map_location=_here, weights_only=False)  # of our own making


def _here(storage: Any, location: str) -> Any:
    """Put what was on another process's device on this one's."""
    return storage if location == "cpu" else storage.cuda()


def _waited(work: Any) -> None:
    """Wait for the others, ready to be told to end meanwhile.

    Raises
    ------
    ProcessError
        When one of them is gone.
    """
    try:
        while not work.is_completed() and not _told_to_end:
            time.sleep(_GLANCE)
        if _told_to_end:
            raise SystemExit(TERMINATED)
        work.wait()
    except RuntimeError as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it is ending
        raise ProcessError("another of the processes has ended before its work was done") from error

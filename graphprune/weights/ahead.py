"""Weights that a thread reads, converts and moves while others are computed with."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import KeysView, Mapping

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from graphprune.weights.deferred import made


def can_read_ahead(device: torch.device) -> bool:
    """Tell whether a thread may make tensors on `device`.

    It may not where a dispatch mode watches what is made, which is so in one thread alone, and not
    for a device that is only said to be there.
    """
    if is_in_torch_dispatch_mode():
        return False
    if device.type == "cpu":
        return True
    there = torch.accelerator.current_accelerator(check_available=True)
    return there is not None and there.type == device.type


class ReadAhead:
    """Tensors that are being made by a thread.

    On an accelerator they are moved from pinned memory, on a stream of their own, so that kernels
    that were launched before run on.

    Parameters
    ----------
    tensors
        Deferred tensors, by name.
    device
        Where they are made, which is a device of this process.
    """

    def __init__(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        self._tensors, self._device = tensors, device
        self._made: dict[str, Tensor] = {}
        self._failed: BaseException | None = None
        self._event: torch.Event | None = None
        self._index = None if device.type == "cpu" else torch.accelerator.current_device_index()
        self._thread = threading.Thread(target=self._make, daemon=True)
        self._thread.start()

    @property
    def names(self) -> KeysView[str]:
        """Of the tensors."""
        return self._tensors.keys()

    def taken(self) -> dict[str, Tensor]:
        """Return the tensors once they are made.

        What making them raises is raised here.
        """
        self._thread.join()
        if self._failed is not None:
            raise self._failed
        if self._event is not None:
            stream = torch.accelerator.current_stream(self._device)
            stream.wait_event(self._event)
            for tensor in self._made.values():
                tensor.record_stream(stream)
        return self._made

    def _make(self) -> None:
        stream: torch.Stream | None = None
        if self._index is not None:
            torch.accelerator.set_device_index(self._index)
            stream = torch.Stream(self._device)
        try:
            with torch.no_grad(), stream or contextlib.nullcontext():
                self._made = {name: made(tensor) for name, tensor in self._tensors.items()}
            if stream is not None:
                self._event = stream.record_event()
        except BaseException as error:  # noqa: BLE001 - whoever takes them is told
            self._failed = error

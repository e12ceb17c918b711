"""Times of kernels: each measured once, kept with what they were measured on."""

from __future__ import annotations

from pathlib import Path

import pytest

from graphprune.backends.onnx.kernel_times import KernelTimes
from graphprune.errors import BackendError
from graphprune.selection.cost import Kernel

KERNELS = [
    Kernel("product", (1, 4, 8, 3)),
    Kernel("product", (2, 4, 8, 3)),
    Kernel("attention", (2, 4, 6, 8, 5)),
]


def test_times_are_kept_and_of_their_provider_alone(tmp_path: Path) -> None:
    file = tmp_path / "times.json"
    times = KernelTimes(path=file, threads=1)
    times.keep()  # those before, and those that are added from now on
    seconds = [times.of(kernel) for kernel in KERNELS]
    assert all(each > 0 for each in seconds) and seconds == [times.of(each) for each in KERNELS]
    assert times.total({KERNELS[0]: 3, KERNELS[1]: 1}) == 3 * seconds[0] + seconds[1]
    assert [KernelTimes(path=file, threads=1).of(kernel) for kernel in KERNELS] == seconds
    with pytest.raises(BackendError, match=r"CPUExecutionProvider with 1 threads, not of .* 2 thr"):
        KernelTimes(path=file, threads=2)
    file.write_text("[]")
    with pytest.raises(BackendError, match="holds no times of kernels"):
        KernelTimes(path=file, threads=1)

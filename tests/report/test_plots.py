"""Pictures: what is written in them can be read."""

from __future__ import annotations

import itertools

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from graphprune.report.plots import draw_histograms

NAMES = [f"model.layers.{n}.{part}" for n in range(4) for part in ("mlp:ffn", "self_attn:kv-head")]
LONG = "model.language_model.encoder.layers.11.block_sparse_moe.experts.gate_up_proj:expert-unit"


def texts(figure: Figure) -> list[Text]:
    """Everything that is written where it can be seen."""
    FigureCanvasAgg(figure).draw()
    found = []
    for axes in figure.axes:
        low, high = sorted(axes.get_xlim())
        ticks = [*axes.xaxis.get_major_ticks(), *axes.xaxis.get_minor_ticks()]
        found += [axes.title, axes.yaxis.label]
        found += [tick.label1 for tick in ticks if low <= tick.get_loc() <= high]
    return [text for text in found if text.get_text() and text.get_visible()]


@pytest.mark.parametrize(
    ("low", "high"), [(1e-3, 7e-3), (1.1e-5, 8e-4), (1e-9, 1e9), (-2e-3, 5e-3)]
)
def test_labels_of_histograms_do_not_overlap(low: float, high: float) -> None:
    names = [*NAMES[:4], LONG, f"{LONG}s"]
    figure = draw_histograms({name: [low, high] for name in names}, label="score of a unit")
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts(figure)]
    assert len(boxes) > 2 * len(names)
    for (one, box), (other, beside) in itertools.combinations(boxes, 2):
        assert not box.overlaps(beside), (one, other)
    whole = figure.bbox
    assert all(box.x0 >= whole.x0 and box.x1 <= whole.x1 for _, box in boxes)

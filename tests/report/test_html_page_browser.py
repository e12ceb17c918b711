"""The page as a person uses it, in headless Chromium (Debian: chromium, chromium-driver)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import coupling_of, random_plan
from chromium import started
from torch import nn

import graphprune as gp
from graphprune.plan.plan import Plan
from graphprune.plan.steps import Step
from graphprune.report.html_page import bare_page, page

pytestmark = pytest.mark.browser

FLAGS = [
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1400,1000",
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    yield from started(*FLAGS)


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Any:
    def show(text: str) -> Any:
        path = tmp_path / "page.html"
        path.write_text(text, encoding="utf-8")
        browser.get(path.as_uri())
        assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
        return browser

    return show


def all_of(browser: Any, selector: str) -> list[Any]:
    return browser.find_elements("css selector", selector)


def panel(browser: Any) -> str:
    return browser.find_element("id", "panel").text


def strip_of(browser: Any, label: str) -> Any:
    return next(each for each in all_of(browser, ".seg[data-g]") if each.text.startswith(label))


def test_what_goes_is_hatched_to_the_end_however_much_is_in_pieces(opened: Any) -> None:
    module = nn.Sequential(nn.Linear(4, 2000), nn.ReLU(), nn.Linear(2000, 3))
    coupling = gp.analyze(gp.capture(module, (torch.ones(2, 4),)))
    (group,) = coupling.groups
    cut = group.cut({(): tuple(range(0, 2000, 2))})
    plan = Plan((Step(coupling.program.fingerprint(), (cut,)),))
    browser = opened(page(coupling, "wide", plan))
    mask = all_of(browser, ".gone[data-gs]")[0].value_of_css_property("mask-image")
    assert mask.count("%") == 4 * 1000
    assert "99.9" in mask


def test_weights_can_be_told_apart_in_a_narrow_window(opened: Any, browser: Any) -> None:
    browser.set_window_size(400, 900)
    try:
        opened(page(coupling_of("llama-gqa"), "tiny"))
        labels = all_of(browser, ".graph .of-weight b")
        assert len({each.text for each in labels}) == len(labels)
        projections = [each for each in labels if each.text.endswith("_proj")]
        cut = "return arguments[0].scrollWidth > arguments[0].clientWidth"
        assert projections
        assert not any(browser.execute_script(cut, each) for each in projections)
    finally:
        browser.set_window_size(1400, 1000)


def test_clicking_a_strip_shows_its_group_and_why_it_is_coupled(opened: Any) -> None:
    browser = opened(page(coupling_of("llama-gqa"), "tiny"))
    strip_of(browser, "ffn").click()
    text = panel(browser)
    assert "model.layers.0.mlp:ffn" in text
    assert "removal is exact" in text
    assert "aten.mul.Tensor in model.layers.0.mlp" in text


def test_pointing_at_a_group_lights_all_its_members_and_dims_the_rest(opened: Any) -> None:
    browser = opened(page(coupling_of("llama-gqa"), "tiny"))
    strip = strip_of(browser, "ffn")
    browser.execute_script(
        "arguments[0].dispatchEvent(new PointerEvent('pointerover', {bubbles: true}))", strip
    )
    group = strip.get_attribute("data-g")
    same = all_of(browser, f'.seg[data-g="{group}"]')
    others = [s for s in all_of(browser, ".seg[data-g]") if s.get_attribute("data-g") != group]
    assert len(same) == 3
    assert {each.value_of_css_property("opacity") for each in same} == {"1"}
    assert {each.value_of_css_property("opacity") for each in others} == {"0.25"}


def test_a_unit_is_shown_where_it_lies(opened: Any) -> None:
    browser = opened(page(coupling_of("llama-gqa"), "tiny"))
    strip_of(browser, "kv").click()
    field = browser.find_element("css selector", "#panel input[type=number]")
    field.clear()
    field.send_keys("1")
    member = next(
        m for g in coupling_of("llama-gqa").groups if g.role == "kv-head" for m in g.members
    )
    indices = member.indices(1)
    assert f"{indices[0]}–" in panel(browser)


def test_the_keyboard_is_enough(opened: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    browser = opened(page(coupling_of("llama-gqa"), "tiny"))
    body = browser.find_element("css selector", "body")
    body.send_keys("/")
    active = browser.switch_to.active_element
    assert active.get_attribute("id") == "search"
    active.send_keys("down_proj")
    assert "2 weights" in panel(browser)
    found = browser.find_element("css selector", "#panel li button")
    found.send_keys(Keys.ENTER)
    assert "model.layers.0.mlp.down_proj.weight" in panel(browser)
    assert all_of(browser, ".weight.found")
    strip = all_of(browser, ".weight.found .seg[data-g]")[0]
    strip.send_keys(Keys.ENTER)
    assert "What a unit saves" in panel(browser)


def test_blocks_that_are_alike_fold_and_unfold(opened: Any) -> None:
    browser = opened(page(coupling_of("llama-gqa"), "tiny"))
    before = len(all_of(browser, ".weight"))
    next(each for each in all_of(browser, ".which button") if each.text == "unfold").click()
    assert {"0", "1"} <= {each.text for each in all_of(browser, "summary b")}
    next(each for each in all_of(browser, ".which button") if each.text == "fold").click()
    assert len(all_of(browser, ".weight")) == before


def test_a_plan_is_shaded(opened: Any) -> None:
    coupling = coupling_of("llama-gqa")
    browser = opened(page(coupling, "tiny", random_plan(coupling)))
    assert all_of(browser, ".gone")
    assert "The plan" in panel(browser)
    assert "→" in panel(browser)


def test_a_plan_says_how_many_units_of_a_group_go_and_what_is_left(opened: Any) -> None:
    coupling = coupling_of("llama-gqa")
    plan = random_plan(coupling)
    browser = opened(page(coupling, "tiny", plan))
    cut = next(cut for cut in plan.steps[0].cuts if cut.role == "ffn")
    strip_of(browser, "ffn").click()
    assert f"{cut.count} of 48 go" in panel(browser)
    folded = next(each.text for each in all_of(browser, "summary") if "× 2" in each.text)
    assert "→" in folded
    legend = browser.find_element("css selector", ".legend").text
    assert "frozen" in legend
    assert "goes by the plan" in legend


def test_what_goes_dims_with_the_strips_of_other_groups(opened: Any) -> None:
    coupling = coupling_of("llama-gqa")
    browser = opened(page(coupling, "tiny", random_plan(coupling)))
    strip = strip_of(browser, "ffn")
    group = strip.get_attribute("data-g")
    strip.click()
    for each in all_of(browser, ".gone[data-gs]"):
        own = group in each.get_attribute("data-gs").split()
        assert float(each.value_of_css_property("opacity")) == (0.8 if own else 0.25)


def test_the_graph_has_the_weights_and_groups_of_a_block(opened: Any) -> None:
    coupling = coupling_of("llama-gqa")
    browser = opened(page(coupling, "tiny"))
    block = [name for name in coupling.program.weights if name.startswith("model.layers.0.")]
    nodes = all_of(browser, ".graph .of-weight")
    assert [f"model.layers.0.{each.text.splitlines()[0]}.weight" for each in nodes] == block
    held = {g.role for g in coupling.groups if not set(g.weights()).isdisjoint(block)}
    groups = all_of(browser, ".graph .of-group")
    assert {each.text.splitlines()[0] for each in groups} == held
    pairs = sum(len(set(g.weights()).intersection(block)) for g in coupling.groups)
    assert len(all_of(browser, ".graph path")) == pairs
    next(each for each in groups if each.text.startswith("ffn")).click()
    assert "model.layers.0.mlp:ffn" in panel(browser)


def test_the_graph_follows_its_block(opened: Any) -> None:
    browser = opened(page(coupling_of("resnet"), "cnn"))
    before = [each.text for each in all_of(browser, ".graph .of-weight")]
    options = all_of(browser, ".drawn select option")
    next(each for each in options if not each.is_selected()).click()
    assert [each.text for each in all_of(browser, ".graph .of-weight")] != before
    boxes = [each.rect for each in all_of(browser, ".graph .of-group")]
    tops = sorted((box["x"], box["y"], box["height"]) for box in boxes)
    for (x, y, height), (other_x, other_y, _) in zip(tops, tops[1:], strict=False):
        assert x != other_x or y + height <= other_y  # none lies over another


def test_there_is_a_way_back_to_click(opened: Any) -> None:
    browser = opened(page(coupling_of("llama-gqa"), "tiny"))
    strip_of(browser, "ffn").click()
    next(each for each in all_of(browser, "#panel td button")).click()
    assert "model.layers.0.mlp.gate_proj.weight" in panel(browser)
    next(each for each in all_of(browser, "#panel nav button") if "back" in each.text).click()
    assert "What a unit saves" in panel(browser)
    next(each for each in all_of(browser, "#panel nav button") if each.text == "overview").click()
    assert panel(browser).startswith("Coupled groups")
    assert not all_of(browser, "#panel nav")


@pytest.mark.parametrize("width", [420, 900, 1400])
def test_labels_are_whole_or_absent_and_nothing_leaves_the_window(opened: Any, width: int) -> None:
    coupling = coupling_of("gemma3")
    browser = opened(page(coupling, "tiny", random_plan(coupling)))
    browser.set_window_size(width, 900)
    time.sleep(0.3)
    try:
        cut = browser.execute_script(
            "return [...document.querySelectorAll('.seg')].filter(each => each.offsetParent && "
            "each.textContent && each.scrollWidth > each.clientWidth).map(each => each.textContent)"
        )
        assert cut == []
        page_width = browser.execute_script("return document.documentElement.scrollWidth")
        assert page_width <= browser.execute_script("return window.innerWidth")
    finally:
        browser.set_window_size(1400, 1000)


def test_strips_are_scaled_by_what_can_be_pruned(opened: Any) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        num_hidden_layers=2,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=60_000,
    )
    browser = opened(page(gp.analyze(gp.capture(LlamaForCausalLM(config).eval())), "wide"))
    ffn, row = strip_of(browser, "ffn"), browser.find_element("css selector", ".weight .dims")
    assert ffn.rect["width"] > 0.5 * row.rect["width"]


def test_a_checkpoint_that_cannot_be_captured_has_its_weights_and_the_reason(opened: Any) -> None:
    browser = opened(bare_page("odd", {"a.weight": (4, 8), "a.bias": (4,)}, "no such operator"))
    assert browser.find_element("css selector", ".problem").text == "no such operator"
    assert len(all_of(browser, ".weight")) == 2


def test_both_themes_are_there(opened: Any) -> None:
    browser = opened(page(coupling_of("llama-gqa"), "tiny"))
    body = browser.find_element("css selector", "body")
    before = body.value_of_css_property("background-color")
    browser.find_element("id", "theme").click()
    assert body.value_of_css_property("background-color") != before


def test_eighty_layers_open_in_a_moment(opened: Any) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        num_hidden_layers=80,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    text = page(gp.analyze(gp.capture(LlamaForCausalLM(config).eval())), "eighty")
    assert len(text) < 5_000_000
    start = time.perf_counter()
    browser = opened(text)
    strip_of(browser, "hidden").click()
    assert "residual" in panel(browser)
    assert time.perf_counter() - start < 10

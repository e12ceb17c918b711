from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from distributions import write_metadata
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from option_passes import Every, Needs

from graphprune.errors import GraphPruneError, PipelineError, UsageError
from graphprune.pipeline import registry
from graphprune.pipeline.options import Option, options_of
from graphprune.pipeline.pipeline import Pipeline


@pytest.fixture(autouse=True)
def test_passes(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path_factory.mktemp("site")
    passes = {"every": "option_passes:Every", "needs": "option_passes:Needs"}
    write_metadata(site, "option-passes", passes)
    monkeypatch.syspath_prepend(site)


# -- text ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("every", Every()),
        ("every{}", Every()),
        ("every{flag=true count=-3}", Every(flag=True, count=-3)),
        ("every{ratio=1e-4}", Every(ratio=1e-4)),
        ("every{ratio=0}", Every(ratio=0.0)),
        ("every{text=out/model.onnx}", Every(text="out/model.onnx")),
        ("every{text=2026}", Every(text="2026")),
        ('every{text="a b, {c} = \\"d\\""}', Every(text='a b, {c} = "d"')),
        ("every{text=model.layers.[0-3].*}", Every(text="model.layers.[0-3].*")),
        ("every{criterion=magnitude}", Every(criterion="magnitude")),
        ("every{limit=4 label=none}", Every(limit=4, label=None)),
        ('every{label="none"}', Every(label="none")),
        ("every{names=a,b rows=}", Every(names=("a", "b"), rows=())),
        ('every{names="a,b",c}', Every(names=("a,b", "c"))),
        ("  every {\n  flag=true\n  count=2\n}\n", Every(flag=True, count=2)),
    ],
)
def test_text_is_read(text: str, expected: Every) -> None:
    pipeline = Pipeline.parse(text)
    assert pipeline == Pipeline([expected])
    assert Pipeline.parse(str(pipeline)) == pipeline
    assert Pipeline.from_yaml(pipeline.to_yaml()) == pipeline


def test_passes_are_separated_by_commas() -> None:
    pipeline = Pipeline.parse("every{count=2}, needs{path=out},every")
    assert pipeline.passes == (Every(count=2), Needs("out"), Every())
    assert pipeline.to_text() == "every{count=2},needs{path=out},every"


def test_defaults_are_left_out_and_none_is_written_where_it_is_not_the_default() -> None:
    assert str(Every()) == "every"
    assert str(Every(label=None, limit=None)) == "every{label=none}"


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
passes = st.builds(
    Every,
    flag=st.booleans(),
    count=st.integers(),
    ratio=st.floats(max_value=1, allow_nan=False, allow_infinity=False),
    text=texts,
    criterion=st.sampled_from(["taylor", "magnitude"]),
    limit=st.none() | st.integers(),
    label=st.none() | texts | st.just("none"),
    names=st.lists(texts, max_size=3).map(tuple),
    rows=st.lists(st.integers(), max_size=3).map(tuple),
)


@given(pipeline=st.builds(Pipeline, st.lists(passes, min_size=1, max_size=3)))
@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_every_pipeline_reads_back(pipeline: Pipeline) -> None:
    assert Pipeline.parse(pipeline.to_text()) == pipeline
    assert Pipeline.from_yaml(pipeline.to_yaml()) == pipeline


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "pipeline column 1: expected the name of a pass, found the end"),
        ("every,", "pipeline column 7: expected the name of a pass, found the end"),
        ("every every", "pipeline column 7: expected '{', ',' or the end, found 'every'"),
        ("every{", "pipeline column 6: '{' is not closed: '}' is missing"),
        ("every{flag}", "pipeline column 7: expected key=value or '}', found 'flag}'"),
        (
            "every{flag = true}",
            "pipeline column 7: expected key=value or '}', found 'flag = true}'",
        ),
        ('every{text="a}', "pipeline column 7: expected key=value or '}', found 'text=\"a}'"),
        ('every{text="\\q"}', "pipeline column 7: option 'text' holds no JSON string: \"\\q\""),
        (
            "every,evry{flag=true}",
            "pipeline column 7: unknown pass 'evry'; did you mean 'every'?",
        ),
        (
            "every{count=1 raito=2}",
            "pipeline column 15: pass 'every' has no option 'raito'; did you mean 'ratio'?",
        ),
        (
            "every{zzz=2}",
            "pipeline column 7: pass 'every' has no option 'zzz'; it takes flag, count, ratio, "
            "text, criterion, limit, label, names, rows",
        ),
        ("every{count=1 count=2}", "pipeline column 15: option 'count' is given twice"),
        (
            "every{count=1.5}",
            "pipeline column 7: option 'count' wants a whole number, not '1.5'",
        ),
        (
            "every{ratio=25%}",
            "pipeline column 7: option 'ratio' wants a number, such as 0.25, not '25%'",
        ),
        ("every{ratio=half}", "pipeline column 7: option 'ratio' wants a number, not 'half'"),
        ("every{ratio=nan}", "pipeline column 7: option 'ratio' wants a finite number, not nan"),
        ("every{flag=yes}", "pipeline column 7: option 'flag' wants true or false, not 'yes'"),
        ("every{count=}", "pipeline column 7: option 'count' takes one value, not 0"),
        ("every{text=a,b}", "pipeline column 7: option 'text' takes one value, not 2"),
        ("every{rows=1,b}", "pipeline column 7: option 'rows' wants a whole number, not 'b'"),
        (
            "every{criterion=tailor}",
            "pipeline column 7: option 'criterion' wants one of taylor, magnitude, not 'tailor'; "
            "did you mean 'taylor'?",
        ),
        ("every,needs", "pipeline column 7: pass 'needs' needs the option 'path'"),
    ],
)
def test_bad_text_is_refused_with_its_place(text: str, message: str) -> None:
    with pytest.raises(PipelineError) as caught:
        Pipeline.parse(text)
    # What else might have been meant follows.
    assert str(caught.value).startswith(message)


def test_what_a_pass_refuses_keeps_its_class_and_gets_a_place() -> None:
    with pytest.raises(UsageError, match=r"^pipeline column 7: ratio 2.0 exceeds 1$"):
        Pipeline.parse("every,every{ratio=2}")
    with pytest.raises(UsageError, match=r"^pipeline item 2: ratio 2.0 exceeds 1$"):
        Pipeline.from_yaml("- every\n- every: {ratio: 2}")


# -- YAML ------------------------------------------------------------------------------------------


def test_yaml_is_a_list_of_names_with_options() -> None:
    text = (
        "- every\n- every:\n    count: 2\n    names: [a, b]\n    label: null\n- needs: {path: x}\n"
    )
    expected = [Every(), Every(count=2, names=("a", "b"), label=None), Needs("x")]
    assert Pipeline.from_yaml(text) == Pipeline(expected)


def test_yaml_is_written_as_people_write_it() -> None:
    pipeline = Pipeline([Every(), Every(ratio=0.25, rows=(2, 3))])
    assert pipeline.to_yaml() == "- every\n- every:\n    ratio: 0.25\n    rows:\n    - 2\n    - 3\n"


def test_yaml_takes_a_number_for_a_float_and_one_that_yaml_takes_for_a_text() -> None:
    assert Pipeline.from_yaml("- every: {ratio: 1}") == Pipeline([Every(ratio=1.0)])
    assert Pipeline.from_yaml("- every: {ratio: 1e-4}") == Pipeline([Every(ratio=1e-4)])


def test_yaml_is_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text("- every: {count: 7}\n")
    assert Pipeline.from_yaml(path) == Pipeline.from_yaml(str(path)) == Pipeline([Every(count=7)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a YAML pipeline is a list of passes, such as '- verify'"),
        ("every", "a YAML pipeline is a list of passes, such as '- verify'"),
        ("- [", "pipeline is not YAML: "),
        ("- every\n- 3", "pipeline item 2: 3 is neither a name nor one name with its options"),
        ("- evry", "pipeline item 1: unknown pass 'evry'; did you mean 'every'?"),
        ("- every: 3", "pipeline item 1: the options of 'every' are 3, not a mapping"),
        ("- every: {raito: 3}", "pipeline item 1: pass 'every' has no option 'raito'; did you"),
        (
            "- every: {count: true}",
            "pipeline item 1: option 'count' wants a whole number, not True",
        ),
        ("- every: {text: 3}", "pipeline item 1: option 'text' wants a text, not 3"),
        ("- every: {names: 3}", "pipeline item 1: option 'names' wants a list, not 3"),
        (
            "- every: {count: null}",
            "pipeline item 1: option 'count' wants a whole number, not None",
        ),
        ("- needs", "pipeline item 1: pass 'needs' needs the option 'path'"),
        ("missing.yaml", "cannot read the pipeline missing.yaml: "),
    ],
)
def test_bad_yaml_is_refused_with_its_place(text: str, message: str) -> None:
    with pytest.raises(PipelineError) as caught:
        Pipeline.from_yaml(text)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


# -- Python ----------------------------------------------------------------------------------------


def test_options_are_checked_in_python_too() -> None:
    assert Every(ratio=1).ratio == 1.0 and isinstance(Every(ratio=1).ratio, float)
    assert Every(names=["a"]).names == ("a",)  # type: ignore[arg-type]
    with pytest.raises(PipelineError, match="option 'count' wants a whole number, not '3'"):
        Every(count="3")  # type: ignore[arg-type]


def test_a_pipeline_holds_only_passes() -> None:
    with pytest.raises(PipelineError, match="pass 2: 'every' is not a pass"):
        Pipeline([Every(), "every"])  # type: ignore[list-item]


def test_pipelines_are_values() -> None:
    assert hash(Pipeline([Every()])) == hash(Pipeline((Every(),)))


def test_an_option_of_another_type_is_a_mistake_of_the_author() -> None:
    with pytest.raises(TypeError, match="option 'x' cannot be of type"):
        options_of(dataclass_with(dict[str, int]))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("flag", "bool"),
        ("criterion", "taylor|magnitude"),
        ("limit", "int or none"),
        ("names", "str,..."),
    ],
)
def test_types_are_said_in_words(name: str, text: str) -> None:
    assert Every.option(name).type_text == text


def dataclass_with(annotation: Any) -> type:
    from dataclasses import make_dataclass

    return make_dataclass("Odd", [("x", annotation)])


# -- the registry ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("prune(target=ffn ratio=0.5)", "prune{target=ffn ratio=0.5}"),
        ("prune[target=ffn ratio=0.5],verify", "prune{target=ffn ratio=0.5},verify"),
        ("prune target=ffn ratio=0.5,verify", "prune{target=ffn ratio=0.5},verify"),
        ("prune{target=ffn ratio=0.5", "prune{target=ffn ratio=0.5}"),
        ("prune{target=ffn ratio=0.5,verify", "prune{target=ffn ratio=0.5},verify"),
        ("prune{target=ffn,kv-heads, ratio=0.5}", "prune{target=ffn,kv-heads ratio=0.5}"),
        ("prune{target: ffn ratio: 0.5}; verify", "prune{target=ffn ratio=0.5},verify"),
        (
            "prune{target=ffn ratio=0.5,merge-kv-heads{groups=2}",
            "prune{target=ffn ratio=0.5},merge-kv-heads{groups=2}",
        ),
        ("verify verify", "verify,verify"),
        ("verify,", "verify"),
    ],
)
def test_another_spelling_is_answered_with_what_to_write(text: str, meant: str) -> None:
    with pytest.raises(PipelineError) as caught:
        Pipeline.parse(text)
    assert str(caught.value).endswith(f"; did you mean {meant!r}?")
    assert Pipeline.parse(meant)


@pytest.mark.parametrize("text", ["prune(target=ffn)", "prune target=ffn", "prune[target=ffn]"])
def test_what_stands_in_place_of_a_brace_is_named_before_what_options_lack(text: str) -> None:
    with pytest.raises(PipelineError, match=r"column \d: expected '\{', ',' or the end, found"):
        Pipeline.parse(text)


@pytest.mark.parametrize("text", ["prune{target=ffn", "prnue(ratio=0.5)", "prune{{}}", '"'])
def test_what_cannot_be_mended_is_not_suggested(text: str) -> None:
    with pytest.raises(PipelineError) as caught:
        Pipeline.parse(text)
    assert "did you mean 'prune{" not in str(caught.value)


def test_texts_where_objects_are_wanted_are_refused_with_what_makes_them() -> None:
    with pytest.raises(PipelineError, match=r"read it with Pipeline.parse\('verify'\)"):
        Pipeline("verify")  # type: ignore[arg-type]
    pipeline = Pipeline.parse("verify")
    with pytest.raises(UsageError, match=r"graphprune.load\('folder'\)"):
        pipeline.run("folder")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"Calibration.from_text\('text.txt', tokenizer\)"):
        pipeline.run(object(), calibration=Path("text.txt"))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="calibration is a list: make it ready with"):
        pipeline.run(object(), calibration=[1])  # type: ignore[arg-type]


def test_the_built_in_passes_are_registered() -> None:
    built_in = {"prune", "merge-kv-heads", "verify", "save-pretrained", "export-onnx", "print"}
    assert built_in <= set(registry.names())


def test_nothing_is_imported_until_a_name_is_asked_for() -> None:
    code = (
        "import sys\n"
        "from graphprune.pipeline import registry\n"
        "from graphprune.pipeline.pipeline import Pipeline\n"
        "names = registry.names()\n"
        "loaded = [m for m in sys.modules if m.startswith('graphprune.passes.')]\n"
        "assert 'print' in names and not loaded, (names, loaded)\n"
        "Pipeline.parse('print,verify')\n"
        "assert 'graphprune.passes.print' in sys.modules\n"
        "assert 'graphprune.passes.export_onnx' not in sys.modules\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_listing_has_summaries_and_options() -> None:
    (info,) = [each for each in registry.listing() if each.name == "every"]
    assert info.summary == "Have an option of every type."
    helps = {option.name: text for option, text in info.options}
    assert helps["flag"] == "Whether to."
    assert helps["ratio"] == "How much; must not exceed one, which takes two lines to say."
    assert helps["names"] == ""
    assert info.options[0][0] == Option("flag", bool, False)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("no_such_module:Odd", "cannot be loaded: ModuleNotFoundError"),
        ("option_passes:Missing", "cannot be loaded: AttributeError"),
        ("option_passes:NotAPass", r"\(option_passes:NotAPass\) is not a graphprune Pass"),
        ("option_passes:Every", r"\(option_passes:Every\) calls itself 'every'"),
    ],
)
def test_a_broken_plugin_is_named_and_does_not_break_the_listing(
    value: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_metadata(tmp_path, "odd", {"odd": value})
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PipelineError, match=f"^pass 'odd' .*{message}"):
        registry.find("odd")
    summaries = {info.name: info.summary for info in registry.listing()}
    assert summaries["odd"].startswith("pass 'odd' ")
    assert summaries["every"] == "Have an option of every type."


def test_two_distributions_cannot_provide_one_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_metadata(tmp_path, "rival", {"every": "option_passes:Needs"})
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        GraphPruneError, match="two distributions provide 'every' in graphprune.passes"
    ):
        registry.find("every")

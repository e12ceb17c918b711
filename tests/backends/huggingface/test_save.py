"""Hugging Face directories: found configs, layers of different size, refusals, what is stored."""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from architectures import without_branches
from safetensors import safe_open
from torch import Tensor

from graphprune.backends.huggingface.layers.modeling_file import pruned_class
from graphprune.backends.huggingface.save import checkpoint_form, save_pretrained
from graphprune.backends.load import load
from graphprune.errors import BackendError, OutputError, UsageError
from graphprune.frontend.capture import capture
from graphprune.ir.program import Program
from graphprune.pipeline.pipeline import Pipeline

WORDS = 97


def llama(**changes: Any) -> Any:
    settings = {
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": WORDS,
        "max_position_embeddings": 128,
    }
    return _model("Llama", "ForCausalLM", settings | changes)


def _model(kind: str, head: str, settings: dict[str, Any]) -> Any:
    config = getattr(transformers, f"{kind}Config")(**settings)
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}{head}")(config).eval()


_COMMON = {
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": WORDS,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2}

MODELS = {
    "llama": ("Llama", "ForCausalLM", _GROUPED),
    "qwen3": ("Qwen3", "ForCausalLM", {**_GROUPED, "head_dim": 16}),
    "phi3": ("Phi3", "ForCausalLM", {**_GROUPED, "pad_token_id": 0}),
    "gpt2": ("GPT2", "LMHeadModel", {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": WORDS}),
    "mixtral": ("Mixtral", "ForCausalLM", {**_GROUPED, "num_local_experts": 4}),
    "bert": ("Bert", "ForMaskedLM", _COMMON),
    "bloom": (
        "Bloom",
        "ForCausalLM",
        {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": WORDS},
    ),
    "t5": (
        "T5",
        "ForConditionalGeneration",
        {
            "d_model": 64,
            "d_ff": 112,
            "d_kv": 16,
            "num_layers": 2,
            "num_heads": 4,
            "vocab_size": WORDS,
        },
    ),
    "vit": (
        "ViT",
        "ForImageClassification",
        {k: v for k, v in _COMMON.items() if k != "vocab_size"}
        | {"image_size": 32, "patch_size": 8},
    ),
    "gemma3": (
        "Gemma3",
        "ForCausalLM",
        {
            **_GROUPED,
            "head_dim": 16,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
}


def model(name: str) -> Any:
    kind, head, settings = MODELS[name]
    if name == "gemma3":
        config = transformers.Gemma3TextConfig(**settings)
        torch.manual_seed(0)
        return transformers.Gemma3ForCausalLM(config).eval()
    return _model(kind, head, settings)


def sliced(big: Any, small: Any) -> Program:
    """`small` with the leading slices of the weights of `big`, as if `big` had been pruned."""
    weights = big.state_dict()
    with torch.no_grad():
        for name, weight in small.named_parameters():
            weight.copy_(weights[name][tuple(slice(0, size) for size in weight.shape)])
    program = capture(small)
    assert program.source is not None
    source = dataclasses.replace(program.source, config=big.config)
    return dataclasses.replace(program, source=source)


def resized(name: str, **changes: Any) -> Program:
    big = model(name)
    config = copy.deepcopy(big.config)
    for field, value in changes.items():
        setattr(config, field, value)
    return sliced(big, type(big)(config).eval())


def uneven(name: str, layers: dict[str, dict[str, int]]) -> Program:
    big = model(name)
    config = copy.deepcopy(big.config)
    config.graphprune = {"layers": layers, "attributes": {}}
    return sliced(big, pruned_class(type(big))(config).eval())


def inputs_for(program: Program) -> dict[str, Tensor]:
    torch.manual_seed(1)
    found = {}
    for value in program.inputs:
        if value.name.endswith("input_ids"):
            found[value.name] = torch.randint(0, WORDS, (3, 7))
        elif value.name == "pixel_values":
            found[value.name] = torch.randn(3, 3, 32, 32)
        elif value.name == "attention_mask":
            found[value.name] = torch.ones((3, 7), dtype=torch.int64)
    return found


def assert_same(left: Program, right: Program) -> None:
    inputs = inputs_for(left)
    expected, found = left(**inputs)["logits"], right(**inputs)["logits"]
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def assert_reloads(program: Program, directory: Path, model_class: Any) -> None:
    inputs = inputs_for(program)
    expected = program(**inputs)["logits"]
    with torch.no_grad():
        found = model_class.from_pretrained(directory)(**inputs).logits
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {"num_key_value_heads": 1}),
        ("llama", {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 80}),
        ("qwen3", {"num_attention_heads": 2, "num_key_value_heads": 1}),
        ("gpt2", {"n_inner": 200}),
        pytest.param(
            "phi3", {"num_key_value_heads": 1, "intermediate_size": 80}, marks=pytest.mark.slow
        ),
        ("phi3", {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}),
        ("mixtral", {"intermediate_size": 80}),
        ("mixtral", {"hidden_size": 48, "head_dim": 16}),
        ("bert", {"intermediate_size": 80}),
        pytest.param("t5", {"d_ff": 80}, marks=pytest.mark.slow),
        ("t5", {"num_heads": 3, "d_kv": 12}),
        ("vit", {"intermediate_size": 80}),
    ],
)
def test_finds_the_config_without_knowing_the_model(
    name: str, changes: dict[str, int], tmp_path: Path
) -> None:
    program = resized(name, **changes)
    save_pretrained(program, tmp_path / "out")
    assert program.source is not None
    before = program.source.config.to_dict()
    stored = json.loads((tmp_path / "out/config.json").read_text())
    assert {field: stored[field] for field in stored if stored[field] != before.get(field)} == {
        "architectures": [program.source.model_class.__name__],
        "dtype": "float32",
        **changes,
    }
    assert_reloads(program, tmp_path / "out", program.source.model_class)


@pytest.mark.parametrize(
    "changes", [{"num_attention_heads": 4, "num_key_value_heads": 4}, {"head_dim": 4}]
)
def test_eight_heads_of_width_eight_are_told_apart(changes: dict[str, int]) -> None:
    big = llama(num_attention_heads=8, num_key_value_heads=8)
    config = copy.deepcopy(big.config)
    for field, value in changes.items():
        setattr(config, field, value)
    found = checkpoint_form(sliced(big, type(big)(config).eval()))
    assert (found.kind, dict(found.changes)) == ("plain", changes)


_RELOAD = """
import sys, torch, transformers
auto = transformers.AutoModelForCausalLM
ids = torch.arange(10).reshape(2, 5)
for directory, trust in zip(sys.argv[1::2], sys.argv[2::2]):
    model = auto.from_pretrained(directory, trust_remote_code=trust == "True")
    with torch.no_grad():
        torch.save(model(input_ids=ids).logits, f"{directory}.logits")
    asked = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    made = model.generate(ids, **asked)
    assert made.shape == (2, 8)
    assert made.tolist() == model.generate(ids, use_cache=False, **asked).tolist()
    print(type(model).__name__)
assert "graphprune" not in sys.modules
"""


def _reloaded(trusted: dict[Path, bool], folder: Path) -> list[str]:
    """The classes of directories in a process of its own, which leaves their logits beside them."""
    directories = [str(part) for pair in trusted.items() for part in pair]
    # The code of a checkpoint is copied into a cache: not into that of whoever runs the tests.
    environment = {"HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _RELOAD, *directories],
        env=environment,
        capture_output=True,
        text=True,
        cwd=folder,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def assert_left_logits_of(program: Program, directory: Path) -> None:
    expected = program(input_ids=torch.arange(10).reshape(2, 5))["logits"]
    logits = torch.load(f"{directory}.logits")
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()


class Written(NamedTuple):
    program: Program
    directory: Path
    class_elsewhere: str


UNEVEN = {"model.layers.1": {"intermediate_size": 80, "num_key_value_heads": 1}}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Written]:
    """A model of equal layers and one of others, written and loaded in a process of its own."""
    folder = tmp_path_factory.mktemp("written")
    sizes = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 80}
    programs = {"plain": resized("llama", **sizes), "uneven": uneven("llama", UNEVEN)}
    programs["half"], _ = without_branches("gemma3", 0, 3)
    for name, program in programs.items():
        save_pretrained(program, folder / name)
    classes = _reloaded({folder / name: name != "plain" for name in programs}, folder)
    return {
        name: Written(program, folder / name, found)
        for (name, program), found in zip(programs.items(), classes, strict=True)
    }


def test_plain_directory_needs_no_graphprune(written: dict[str, Written]) -> None:
    program, directory, name = written["plain"]
    assert name == "LlamaForCausalLM"
    assert_left_logits_of(program, directory)
    assert not (directory / "modeling_graphprune.py").exists()


def test_layers_of_different_size_need_no_graphprune(
    written: dict[str, Written], tmp_path: Path
) -> None:
    program, directory, name = written["uneven"]
    found = checkpoint_form(program)
    assert found.kind == "remote-code"
    assert "model.layers.0" in found.reason
    assert {path: dict(sizes) for path, sizes in found.layers.items()} == UNEVEN

    stored = json.loads((directory / "config.json").read_text())
    assert stored["per_layer_config"] == {"1": UNEVEN["model.layers.1"]}
    read = transformers.AutoConfig.from_pretrained(directory)
    whole = model("llama").config.intermediate_size
    assert [each.intermediate_size for each in read.per_layer_config] == [whole, 80]
    assert name == "PrunedLlamaForCausalLM"
    assert_left_logits_of(program, directory)

    again = load(directory)
    assert_same(program, again)
    save_pretrained(again, tmp_path / "twice")
    assert (tmp_path / "twice/config.json").read_text() == (directory / "config.json").read_text()


def test_layers_without_a_branch_need_no_graphprune(written: dict[str, Written]) -> None:
    program, directory, name = written["half"]
    assert name == "PrunedGemma3ForCausalLM"
    assert_left_logits_of(program, directory)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        transformers.AutoModelForCausalLM.from_pretrained(directory)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("gpt2", {"transformer.h.0": {"n_inner": 80}}),
        ("mixtral", {"model.layers.0": {"intermediate_size": 80}}),
        ("t5", {"encoder.block.1": {"d_ff": 80}}),
        ("bert", {"bert.encoder.layer.0": {"intermediate_size": 80}}),
    ],
)
def test_layers_of_different_size_load(
    name: str, layers: dict[str, dict[str, int]], tmp_path: Path
) -> None:
    program = uneven(name, layers)
    save_pretrained(program, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["graphprune"]["layers"] == layers
    assert_reloads(program, tmp_path / "out", pruned_class(type(model(name))))


def test_layers_follow_the_attention_of_the_model() -> None:
    small = pruned_class(transformers.LlamaForCausalLM)
    config = model("llama").config
    config.graphprune = {"layers": {"model.layers.1": {"num_key_value_heads": 1}}}
    made = small(config)
    made.set_attn_implementation("eager")
    attention = made.model.layers[1].self_attn
    assert attention.config._attn_implementation == "eager"
    assert (attention.config.num_key_value_heads, config.num_key_value_heads) == (1, 2)
    assert copy.deepcopy(attention.config).num_key_value_heads == 1


def pruned(name: str, pipeline: str) -> Program:
    big = model(name)
    with torch.no_grad():
        for weight in big.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return Pipeline.parse(pipeline).run(capture(big)).program


def test_hidden_of_llama_is_plain(tmp_path: Path) -> None:
    program = pruned("llama", "prune{target=hidden ratio=0.25 criterion=l2}")
    found = checkpoint_form(program)
    assert found.kind == "plain"
    assert found.changes["hidden_size"] == 48
    assert found.changes["rms_norm_eps"] == pytest.approx(1e-6 * 64 / 48)
    save_pretrained(program, tmp_path / "out")
    assert_same(program, load(tmp_path / "out"))


@pytest.mark.slow
def test_hidden_of_gemma_keeps_what_is_not_rescaled(tmp_path: Path) -> None:
    # The norms of queries and keys share the epsilon's field; the embedding's scale is a buffer.
    program = pruned("gemma3", "prune{target=hidden ratio=0.25 criterion=l2}")
    found = checkpoint_form(program)
    assert found.kind == "remote-code"
    assert "epsilon" in found.reason
    assert found.attributes["model.norm"] == {"eps": pytest.approx(1e-6 * 64 / 48)}
    assert found.buffers == {"model.embed_tokens.embed_scale": 8.0}
    save_pretrained(program, tmp_path / "out")
    assert_same(program, load(tmp_path / "out"))


@pytest.mark.slow
def test_pruned_rotary_pairs_need_their_own_frequencies(tmp_path: Path) -> None:
    program = pruned("llama", "prune{target=all ratio=0.25 criterion=l2}")
    found = checkpoint_form(program)
    assert found.kind == "remote-code"
    assert "inv_freq" in found.reason
    assert len(found.buffers["model.rotary_emb.inv_freq"]) == 6
    save_pretrained(program, tmp_path / "out")
    _reloaded({tmp_path / "out": True}, tmp_path)
    assert_left_logits_of(program, tmp_path / "out")


@pytest.mark.slow
def test_sizes_that_no_field_sets_are_set_by_the_modeling_file(tmp_path: Path) -> None:
    program = pruned("bloom", "prune{target=ffn ratio=0.25 criterion=l2}")
    found = checkpoint_form(program)
    assert found.kind == "remote-code"
    assert "dense_h_to_4h" in found.reason
    assert found.shapes["transformer.h.1.mlp.dense_4h_to_h.weight"] == [64, 192]
    save_pretrained(program, tmp_path / "out")
    _reloaded({tmp_path / "out": True}, tmp_path)
    assert_left_logits_of(program, tmp_path / "out")


@pytest.mark.slow
def test_heads_that_the_code_counts_by_itself_need_shapes_only(tmp_path: Path) -> None:
    program = pruned("bert", "prune{target=kv-heads ratio=0.5 criterion=l2}")
    assert checkpoint_form(program).kind == "remote-code"
    save_pretrained(program, tmp_path / "out")
    assert_reloads(program, tmp_path / "out", pruned_class(type(model("bert"))))


@pytest.mark.parametrize(
    ("name", "pipeline", "words"),
    [
        ("llama", "prune{target=head-dim ratio=0.25 criterion=l2}", "o_proj.weight the size 48"),
    ],
)
def test_refuses_what_no_config_can_say(
    name: str, pipeline: str, words: str, tmp_path: Path
) -> None:
    program = pruned(name, pipeline)
    found = checkpoint_form(program)
    assert found.kind == "none"
    assert words in found.reason
    assert "\n" not in found.reason
    with pytest.raises(BackendError, match="no Hugging Face checkpoint can hold this program"):
        save_pretrained(program, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_refuses_what_is_not_of_transformers(tmp_path: Path) -> None:
    program = capture(torch.nn.Linear(4, 4), (torch.ones(2, 4),))
    with pytest.raises(BackendError, match="not captured from a transformers model"):
        save_pretrained(program, tmp_path / "out")


def test_leaves_an_occupied_directory_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="not empty"):
        save_pretrained(capture(llama()), tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine.txt"]


def test_without_weights_only_sizes_are_compared(tmp_path: Path) -> None:
    with torch.device("meta"):
        program = capture(transformers.LlamaForCausalLM(llama().config))
    assert checkpoint_form(program).notes == (
        "only sizes were compared: the program has no weights",
    )
    with pytest.raises(BackendError, match="no weights to write"):
        save_pretrained(program, tmp_path / "out")


# -- what is stored -----------------------------------------------------------------------------


def _stored(directory: Path) -> dict[str, torch.dtype]:
    with safe_open(directory / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_is_written_has_the_types_that_were_read(dtype: torch.dtype, tmp_path: Path) -> None:
    model = llama().to(dtype)
    apart = "model.norm.weight"
    model.save_pretrained(tmp_path / "in", state_dict=_with_float(model.state_dict(), apart))
    before = _stored(tmp_path / "in")
    program = load(tmp_path / "in")
    refitted = "model.layers.0.mlp.down_proj.weight"
    changed = {name: w * 1.001 for name, w in program.take((apart, refitted)).items()}
    program = program.with_weights(changed)
    assert all(weight.dtype is torch.float32 for weight in changed.values())

    save_pretrained(program, tmp_path / "out")
    assert _stored(tmp_path / "out") == before
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == str(dtype)[6:]
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("in", "out")]
    assert sizes[1] <= sizes[0]
    again = load(tmp_path / "out")
    assert torch.equal(again.weight(apart), program.weight(apart))
    assert torch.equal(again.weight(refitted), program.weight(refitted))
    # An archive of it knows the same.
    program.save(tmp_path / "archive")
    save_pretrained(load(tmp_path / "archive"), tmp_path / "later")
    assert _stored(tmp_path / "later") == before


def _with_float(state: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return {**state, name: state[name].float()}


def test_dtype_casts_everything(tmp_path: Path) -> None:
    program = capture(llama())
    save_pretrained(program, tmp_path / "out", dtype="bfloat16")
    assert set(_stored(tmp_path / "out").values()) == {torch.bfloat16}
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    name = "lm_head.weight"
    program = program.with_weights({name: program.weight(name) * 1e30})
    with pytest.raises(BackendError, match=r"lm_head\.weight holds values that are too large"):
        save_pretrained(program, tmp_path / "never", dtype=torch.float16)
    with pytest.raises(UsageError, match="'int8'"):
        save_pretrained(program, tmp_path / "never", dtype="int8")
    assert not (tmp_path / "never").exists()


def test_weights_can_be_read_by_whoever_reads_the_config(tmp_path: Path) -> None:
    save_pretrained(pruned("llama", "prune{target=ffn ratio=0.25 criterion=l2}"), tmp_path / "out")
    modes = {path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert len(modes) == 1


def test_a_tied_weight_is_stored_once(tmp_path: Path) -> None:
    program = capture(llama(tie_word_embeddings=True))
    save_pretrained(program, tmp_path / "out")
    assert "lm_head.weight" not in _stored(tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is True
    assert load(tmp_path / "out").aliases == program.aliases


def test_copies_what_does_not_depend_on_sizes(tmp_path: Path) -> None:
    from byte_llama import save_checkpoint

    source = save_checkpoint(tmp_path / "in")
    odd = {"temperature": 0.5, "do_sample": False, "max_new_tokens": 7}
    (source / "generation_config.json").write_text(json.dumps(odd))
    save_pretrained(load(source), tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


def test_generation_config_of_a_model_in_memory(tmp_path: Path) -> None:
    made = llama()
    made.generation_config.max_new_tokens = 11
    save_pretrained(capture(made), tmp_path / "out")
    stored = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert stored["max_new_tokens"] == 11


def test_experts_are_stored_as_they_are_published(tmp_path: Path) -> None:
    made = model("mixtral")
    save_pretrained(capture(made), tmp_path / "out")
    made.save_pretrained(tmp_path / "theirs")
    assert _stored(tmp_path / "out") == _stored(tmp_path / "theirs")

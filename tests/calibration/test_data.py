"""Windows of text are drawn the same way everywhere; what cannot be read is refused in a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_llama import byte_llama, byte_tokenizer
from safetensors.torch import save_file
from torch import Tensor, nn

import graphprune as gp
import graphprune.calibration.data as calibration_module
import graphprune.calibration.logits as logits_module
from graphprune.calibration.data import Calibration, inputs_of
from graphprune.calibration.losses import next_token_loss, task_loss
from graphprune.calibration.tokens import vocabulary_digest
from graphprune.errors import CalibrationError
from graphprune.weights.tensors import digest

WORDS = " ".join(str(number) for number in range(1000, 1400))
TEXT = "".join(f"line {number} of a text that is long enough\n" for number in range(60))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def ids_of(calibration: Calibration) -> torch.Tensor:
    return torch.cat([batch["input_ids"] for batch in calibration])


def test_defaults_are_ten_windows_of_64_tokens(text: Path, tokenizer: Any) -> None:
    calibration = Calibration.from_text(text, tokenizer)
    assert ids_of(calibration).shape == (10, 64)
    assert calibration.tokens == 640
    assert [len(batch["input_ids"]) for batch in calibration] == [5, 5]
    keys = {"kind", "sha256", "samples", "length", "tokens", "wanted", "first tokens", "tokenizer"}
    assert calibration.describe().keys() == keys | {"seed", "source"}
    assert calibration.describe()["source"] == "text.txt"
    assert calibration.describe()["tokenizer"] == vocabulary_digest(tokenizer) != ""
    assert (calibration.describe()["samples"], calibration.describe()["length"]) == (10, 64)


def test_windows_are_pieces_of_the_text_that_do_not_overlap(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "words.txt").write_text(WORDS)
    calibration = Calibration.from_text(tmp_path / "words.txt", tokenizer, samples=20, length=32)
    windows = [tokenizer.decode(row) for row in ids_of(calibration)]
    starts = [WORDS.index(window) for window in windows]
    assert len(set(starts)) == 20
    assert all(start % 32 == 0 for start in starts)
    assert starts != sorted(starts)


def test_what_is_held_out_is_of_the_same_text_and_not_calibrated_with(
    text: Path, tokenizer: Any
) -> None:
    calibration = Calibration.from_text(text, tokenizer, samples=5, length=32)
    held_out = torch.cat([batch["input_ids"] for batch in calibration.held_out])
    used = {tuple(row) for row in ids_of(calibration).tolist()}
    assert held_out.shape == (64, 32)  # as many as are wanted of the 70
    assert used.isdisjoint(map(tuple, held_out.tolist()))
    whole = Calibration.from_text(text, tokenizer, samples=len(TEXT) // 32, length=32)
    assert whole.held_out == ()


def test_batches_say_that_every_token_counts(text: Path, tokenizer: Any) -> None:
    for batch in Calibration.from_text(text, tokenizer):
        assert batch["attention_mask"].shape == batch["input_ids"].shape
        assert batch["attention_mask"].all()


def test_the_seed_decides_and_iteration_repeats(text: Path, tokenizer: Any) -> None:
    first = Calibration.from_text(text, tokenizer, seed=1)
    again = Calibration.from_text(text, tokenizer, seed=1)
    other = Calibration.from_text(text, tokenizer, seed=2)
    assert torch.equal(ids_of(first), ids_of(again))
    assert torch.equal(ids_of(first), ids_of(first))
    assert first.sha256 == again.sha256 != other.sha256
    assert not torch.equal(ids_of(first), ids_of(other))


def test_drawing_leaves_the_global_generator_alone(text: Path, tokenizer: Any) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    Calibration.from_text(text, tokenizer)
    assert torch.equal(torch.rand(3), expected)


def test_a_batch_that_is_changed_does_not_change_the_calibration(
    text: Path, tokenizer: Any
) -> None:
    calibration = Calibration.from_text(text, tokenizer)
    next(iter(calibration)).clear()
    assert calibration.tokens == ids_of(calibration).numel() == 640


def test_json_lines_are_joined(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": part}) for part in ("ab", "cd")) + "\n\n")
    calibration = Calibration.from_text(path, tokenizer, samples=1, length=4)
    assert tokenizer.decode(ids_of(calibration)[0]) == "abcd"


def test_only_so_many_characters_are_drawn_from(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "long.txt").write_text("a" * 64 + "b" * 640)
    monkeypatch.setattr(calibration_module, "_MOST", 64)
    drawn = Calibration.from_text(tmp_path / "long.txt", tokenizer, samples=4, length=16)
    assert {tokenizer.decode(row) for row in ids_of(drawn)} == {"a" * 16}
    with pytest.raises(CalibrationError, match="has 64 tokens; 5 samples of 16 need 80"):
        Calibration.from_text(tmp_path / "long.txt", tokenizer, samples=5, length=16)


def test_a_field_of_json_lines_is_a_source(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "text.jsonl").write_text(json.dumps({"body": "abcd"}) + "\n")
    source = f"{tmp_path / 'text.jsonl'}:body"
    drawn = Calibration.from_text(source, tokenizer, samples=1, length=4)
    assert tokenizer.decode(ids_of(drawn)[0]) == "abcd"


def test_a_directory_is_a_tokenizer(text: Path, tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    read = Calibration.from_text(text, tmp_path / "tokenizer")
    assert read.sha256 == Calibration.from_text(text, tokenizer).sha256


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.txt", None, r"absent\.txt does not exist"),
        ("empty.txt", b" \n", r"empty\.txt is empty"),
        ("latin.txt", b"caf\xe9", r"latin\.txt is not UTF-8: byte 3"),
        ("short.txt", b"too short", r"short\.txt has 9 tokens; 10 samples of 64 need 640"),
        ("broken.jsonl", b"{", r"broken\.jsonl:1 is not JSON"),
        ("other.jsonl", b'{"body": "x"}', r"other\.jsonl:1 has no field 'text'"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_in_a_line(
    tmp_path: Path, tokenizer: Any, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=message) as caught:
        Calibration.from_text(tmp_path / name, tokenizer)
    assert "\n" not in str(caught.value)


def test_a_directory_is_no_text(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(CalibrationError, match="is a directory"):
        Calibration.from_text(tmp_path, tokenizer)


def test_a_directory_without_a_tokenizer_is_refused_in_a_line(text: Path, tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    with pytest.raises(CalibrationError, match="nothing holds no tokenizer") as caught:
        Calibration.from_text(text, tmp_path / "nothing")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("option", ["samples", "length", "batch_size"])
def test_nothing_of_something_is_refused(text: Path, tokenizer: Any, option: str) -> None:
    with pytest.raises(CalibrationError, match=f"{option} must be at least 1, not 0"):
        Calibration.from_text(text, tokenizer, **{option: 0})


def test_batches_are_taken_as_they_are() -> None:
    batches = [{"x": torch.ones(3, 2)}, {"x": torch.ones(1, 2)}]
    calibration = Calibration.from_batches(batches)
    assert [batch["x"] is given["x"] for batch, given in zip(calibration, batches, strict=True)]
    described = calibration.describe()
    assert (described["kind"], described["samples"]) == ("batches", 4)
    assert described["length"] is described["seed"] is None
    assert calibration.tokens == 0


def test_the_digest_of_batches_knows_names_shapes_types_and_values() -> None:
    one = torch.ones(2, 2)
    batches = [
        {"x": one},
        {"y": one},
        {"x": one.view(1, 4)},
        {"x": one.view(torch.int32)},
        {"x": 2 * one},
        {"x": one.bfloat16()},
    ]
    assert len({Calibration.from_batches([batch]).sha256 for batch in batches}) == len(batches)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "no calibration batches"),
        ([{}], "batch 0 is empty"),
        ([{"x": [1, 2]}], "batch 0: 'x' is a list, no tensor"),
        ([{"x": torch.ones(1)}, {"x": torch.ones(0, 2)}], r"batch 1: 'x' has no samples: \(0, 2\)"),
        ([{"x": torch.tensor(1)}], r"'x' has no samples: \(\)"),
    ],
)
def test_batches_that_cannot_be_used_are_refused(batches: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        Calibration.from_batches(batches)


def test_check_refuses_what_the_program_cannot_take() -> None:
    program = gp.capture(byte_llama())
    Calibration.from_batches([{"input_ids": torch.tensor([[255]])}]).check(program)
    with pytest.raises(CalibrationError, match="made token 256, the vocabulary has 256"):
        Calibration.from_batches([{"input_ids": torch.tensor([[256]])}]).check(program)
    with pytest.raises(CalibrationError, match="holds 'pixels'; the program takes input_ids"):
        Calibration.from_batches([{"pixels": torch.ones(1, 2)}]).check(program)
    for length in (3, 5):
        batch = {name: torch.ones(2, 4).long() for name in ("input_ids", "attention_mask")}
        batch["attention_mask"] = torch.ones(2, length).long()
        with pytest.raises(
            CalibrationError, match=rf"'attention_mask' is \(2, {length}\), and its"
        ):
            Calibration.from_batches([batch]).check(program)


@pytest.mark.parametrize(
    ("x", "found"),
    [
        (torch.ones(3, 4, dtype=torch.float64), r"\(3, 4\) of torch.float64"),
        (torch.ones(3, 4, dtype=torch.int64), r"\(3, 4\) of torch.int64"),
        (torch.ones(4), r"\(4,\) of torch.float32"),
        (torch.ones(3, 5), r"\(3, 5\) of torch.float32"),
    ],
)
def test_check_refuses_another_dtype_rank_or_size(x: torch.Tensor, found: str) -> None:
    program = gp.capture(torch.nn.Linear(4, 2), (torch.ones(2, 4),))
    fits = {"input": torch.ones(3, 4)}
    Calibration.from_batches([fits]).check(program)
    with pytest.raises(
        CalibrationError, match=rf"batch 1: 'input' is {found}; .* \(s\d+, 4\) of torch.float32"
    ):
        Calibration.from_batches([fits, {"input": x}]).check(program)


# -- the loss -----------------------------------------------------------------------------------


def test_loss_equals_that_of_transformers() -> None:
    model = byte_llama()
    ids = torch.randint(256, (3, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(input_ids=ids, labels=ids).loss
        logits = model(input_ids=ids).logits
    assert torch.allclose(next_token_loss(logits, {"input_ids": ids}), expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_neither_predicted_nor_predicts(side: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, ids = torch.randn(1, 5, 7, generator=generator), torch.tensor([[1, 2, 3, 4, 5]])
    expected = next_token_loss(logits, {"input_ids": ids})
    rubbish, pad = torch.randn(1, 2, 7, generator=generator), torch.zeros(1, 2, dtype=torch.int64)
    parts = [(logits, rubbish), (ids, pad), (torch.ones_like(ids), pad)]
    whole, tokens, mask = (torch.cat(pair[:: 1 if side == "right" else -1], 1) for pair in parts)
    padded = next_token_loss(whole, {"input_ids": tokens, "attention_mask": mask})
    assert torch.allclose(padded, expected)


def test_hidden_states_are_no_logits_of_tokens() -> None:
    """What an encoder gives is of the same rank, and cross entropy would take it for logits."""
    hidden, ids = torch.zeros(1, 3, 8), torch.tensor([[1, 2, 11]])
    with pytest.raises(
        CalibrationError, match=r"8 numbers for each, and there is a token 11; .*l2"
    ):
        next_token_loss(hidden, {"input_ids": ids})


def test_loss_is_differentiable_and_float32() -> None:
    logits = torch.randn(2, 4, 8, dtype=torch.bfloat16, requires_grad=True)
    loss = next_token_loss(logits, {"input_ids": torch.zeros(2, 4, dtype=torch.int64)})
    loss.backward()
    assert loss.dtype == torch.float32
    assert logits.grad is not None
    assert logits.grad[:, :-1].abs().sum() > 0
    assert logits.grad[:, -1].abs().sum() == 0


@pytest.mark.parametrize(
    ("shape", "batch"),
    [
        ((2, 3, 8), {}),
        ((2, 8), {"input_ids": torch.zeros(2, 8, dtype=torch.int64)}),
        ((2, 3, 8), {"input_ids": torch.zeros(2, 4, dtype=torch.int64)}),
        ((2, 1, 8), {"input_ids": torch.zeros(2, 1, dtype=torch.int64)}),
    ],
)
def test_a_loss_that_makes_no_sense_is_refused(
    shape: tuple[int, ...], batch: dict[str, torch.Tensor]
) -> None:
    with pytest.raises(CalibrationError, match="next-token loss needs|no next token to predict"):
        next_token_loss(torch.zeros(shape), batch)


# -- labels ----------------------------------------------------------------------------------------


def test_labels_are_no_inputs_and_come_along_where_they_are_asked_for() -> None:
    batches = [
        {"x": torch.zeros(2, 3), "labels": torch.tensor([4, 1])},
        {"x": torch.ones(1, 3), "labels": torch.tensor([0])},
    ]
    calibration = Calibration.from_batches(batches)
    assert [list(batch) for batch in calibration] == [["x"], ["x"]]
    assert [batch["labels"].tolist() for batch in calibration.labeled()] == [[4, 1], [0]]
    assert [list(inputs_of(batch)) for batch in calibration.labeled()] == [["x"], ["x"]]
    plain = Calibration.from_batches([inputs_of(batch) for batch in batches])
    assert [list(batch) for batch in plain.labeled()] == [["x"], ["x"]]
    assert plain.sha256 != calibration.sha256
    assert plain.samples == calibration.samples == 3


def test_the_loss_of_labels_is_their_cross_entropy_and_without_any_that_of_next_tokens() -> None:
    logits = torch.randn(2, 3, 5)
    labels = torch.tensor([[1, -100, 4], [0, 2, -100]])
    counted = [(0, 0, 1), (0, 2, 4), (1, 0, 0), (1, 1, 2)]
    expected = -torch.stack([logits[b, t].log_softmax(-1)[k] for b, t, k in counted]).mean()
    assert torch.allclose(task_loss(logits, {"x": logits, "labels": labels}), expected)
    tokens = {"input_ids": torch.tensor([[1, 2, 3], [0, 4, 2]])}
    assert torch.equal(task_loss(logits, tokens), next_token_loss(logits, tokens))
    some = {**tokens, "attention_mask": torch.ones_like(tokens["input_ids"])}
    rows = logits[:, :-1].flatten(0, 1)[::3].log_softmax(-1)
    expected = -rows.gather(1, some["input_ids"][:, 1:].flatten()[::3, None]).mean()
    assert torch.allclose(task_loss(logits, some, 3), expected)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), r"labels \(3,\) of torch.int64 do not fit its 2"),
        (torch.zeros(2), r"labels \(2,\) of torch.float32 do not fit its 2 samples: int64 is"),
        (None, "1 of 2 calibration batches have labels"),
    ],
)
def test_labels_that_do_not_belong_to_the_batches_are_refused(
    labels: torch.Tensor | None, message: str
) -> None:
    first = {"x": torch.zeros(2, 3), "labels": torch.zeros(2, dtype=torch.int64)}
    second = {"x": torch.zeros(2, 3)} | ({} if labels is None else {"labels": labels})
    with pytest.raises(CalibrationError, match=message):
        Calibration.from_batches([first, second])


@pytest.mark.parametrize(
    ("shape", "last", "message"),
    [
        ((2, 4, 9), 8, r"labels \(2,\) do not fit logits \(2, 4, 9\)"),
        ((2, 3), 3, "there is a label 3; the logits are of 3 classes"),
        ((2, 3), -1, "there is a label -1; the logits are of 3 classes"),
    ],
)
def test_labels_that_the_logits_know_nothing_of_are_refused(
    shape: tuple[int, ...], last: int, message: str
) -> None:
    with pytest.raises(CalibrationError, match=message):
        task_loss(torch.zeros(shape), {"labels": torch.tensor([0, last])})


def test_digests_tell_values_names_and_types_apart() -> None:
    zeros = {"a": torch.zeros(4)}
    others: list[dict[str, torch.Tensor]] = [
        {"b": torch.zeros(4)},
        {"a": torch.zeros(2, 2)},
        {"a": torch.zeros(4, dtype=torch.int32)},
        {"a": torch.tensor([0.0, 0.0, 0.0, 1.0])},
        {"a": torch.zeros(4, dtype=torch.bfloat16)},
    ]
    assert len({digest([each]) for each in (zeros, *others)}) == 6
    assert digest([zeros]) == digest([{"a": torch.ones(8)[::2] * 0}])


# -- as much as is needed --------------------------------------------------------------------------


def test_a_size_that_is_left_open_grows_to_what_is_needed(text: Path, tokenizer: Any) -> None:
    few = Calibration.from_text(text, tokenizer)
    assert few.enough_for(600).sha256 == few.sha256
    more = few.enough_for(1500, longest=128)
    assert (more.length, more.samples, more.wanted) == (128, 12, 1500)
    used = {tuple(row) for row in ids_of(more).tolist()}
    assert len(used) == 12
    assert used.isdisjoint(tuple(r) for b in more.held_out for r in b["input_ids"].tolist())


def test_a_size_that_was_asked_for_stays(text: Path, tokenizer: Any) -> None:
    asked = Calibration.from_text(text, tokenizer, samples=3).enough_for(1500)
    assert (asked.samples, asked.length, asked.wanted) == (3, 64, 1500)
    longer = Calibration.from_text(text, tokenizer, length=32).enough_for(1500)
    assert (longer.samples, longer.length) == (47, 32)
    batches = Calibration.from_batches([{"x": torch.zeros(2, 3)}])
    assert batches.enough_for(1500).samples == 2


def test_a_text_too_short_gives_what_it_has_and_holds_some_out(text: Path, tokenizer: Any) -> None:
    found = Calibration.from_text(text, tokenizer).enough_for(100_000, longest=64)
    assert found.tokens < found.wanted == 100_000
    held_out = sum(len(batch["input_ids"]) for batch in found.held_out)
    assert found.samples + held_out == len(TEXT) // 64
    assert held_out == len(TEXT) // 64 // 10


def test_least_squares_are_given_several_rows_for_each_input(text: Path, tokenizer: Any) -> None:
    program = gp.capture(byte_llama(intermediate_size=96))
    data = Calibration.from_text(text, tokenizer)
    taylor, fitted, sparse = (
        gp.Pipeline.parse(each).enough(data, program)
        for each in (
            "prune{target=ffn ratio=0.5 criterion=taylor}",
            "prune{target=ffn ratio=0.5 criterion=obs}",
            "prune{target=ffn ratio=0.5 criterion=taylor},reconstruct",
        )
    )
    assert taylor.tokens == 640
    assert fitted.tokens == sparse.tokens == 8 * 96
    result = gp.Pipeline.parse("prune{target=ffn ratio=0.5 criterion=obs}").run(
        program, calibration=data
    )
    assert result.report.calibration is not None
    assert result.report.calibration["sha256"] == fitted.sha256
    assert result.report.calibration["wanted"] == 8 * 96


# -- losses in pieces ------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [False, True])
def test_a_loss_in_pieces_is_the_loss(monkeypatch: pytest.MonkeyPatch, labels: bool) -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 11, (3, 9))
    batch = {"input_ids": ids, **({"labels": torch.where(ids > 8, -100, ids)} if labels else {})}

    def loss_and_gradient() -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        logits = torch.randn(3, 9, 11, generator=generator).requires_grad_()
        loss = task_loss(logits, batch)
        loss.backward()
        assert logits.grad is not None
        return loss.detach(), logits.grad

    whole = loss_and_gradient()
    monkeypatch.setattr(logits_module, "_AT_ONCE", 50)
    torch.testing.assert_close(loss_and_gradient(), whole)


# -- inputs that are no text, and programs that take text in another way ---------------------------


def images(path: Path, count: int = 20) -> Path:
    labels = torch.arange(count) % 3
    save_file({"pixel_values": torch.arange(count).float().view(count, 1), "labels": labels}, path)
    return path


def test_samples_of_tensors_are_drawn_and_a_tenth_is_held_out(tmp_path: Path) -> None:
    path = images(tmp_path / "images.safetensors")
    found = Calibration.from_tensors(path, batch_size=8)
    drawn = torch.cat([batch["pixel_values"] for batch in found]).flatten().tolist()
    held_out = torch.cat([batch["pixel_values"] for batch in found.held_out]).flatten().tolist()
    assert (found.samples, len(held_out)) == (18, 2)
    assert sorted(drawn + held_out) == list(range(20))
    assert drawn != sorted(drawn)
    assert found.labels is not None
    assert torch.cat(found.labels).tolist() == [each % 3 for each in drawn]
    assert all(batch.keys() == {"pixel_values"} for batch in found.held_out)
    few = Calibration.from_tensors(path, samples=4, seed=1)
    assert (few.samples, few.seed, len(few.held_out)) == (4, 1, 1)
    assert few.sha256 != Calibration.from_tensors(path, samples=4).sha256


@pytest.mark.parametrize(
    ("name", "samples", "message"),
    [
        ("gone.safetensors", None, "is missing"),
        ("text.safetensors", None, "text.safetensors"),
        ("none.safetensors", None, "holds no tensors"),
        ("uneven.safetensors", None, "2 samples of 'a' and 3 of 'b'"),
        ("images.safetensors", 21, "holds 20 samples; 21 are asked for"),
        ("images.safetensors", 0, "holds 20 samples; 0 are asked for"),
    ],
)
def test_a_file_of_tensors_that_cannot_be_used_is_refused_in_a_line(
    tmp_path: Path, name: str, samples: int | None, message: str
) -> None:
    (tmp_path / "text.safetensors").write_text("a text")
    save_file({}, tmp_path / "none.safetensors")
    save_file({"a": torch.zeros(2), "b": torch.zeros(3)}, tmp_path / "uneven.safetensors")
    images(tmp_path / "images.safetensors")
    with pytest.raises(CalibrationError, match=message) as caught:
        Calibration.from_tensors(tmp_path / name, samples=samples)
    assert "\n" not in str(caught.value)


class Pair(nn.Module):
    """An encoder and a decoder of tokens that give three classes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(300, 4), nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor) -> Tensor:
        both = self.embed(input_ids).mean(1) + self.embed(decoder_input_ids).mean(1)
        return self.down(self.up(both).relu())


def test_encoder_and_decoder_get_the_same_windows_and_a_vocabulary_is_no_list_of_classes(
    text: Path, tokenizer: Any
) -> None:
    ids = torch.zeros(2, 6, dtype=torch.int64)
    program = gp.capture(Pair(), example_inputs=(ids, ids))
    data = Calibration.from_text(text, tokenizer, samples=4, length=6).for_program(program)
    data.check(program)
    for batch in (*data, *data.held_out):
        assert batch.keys() == {"input_ids", "decoder_input_ids"}
        assert torch.equal(batch["input_ids"], batch["decoder_input_ids"])
    result = gp.Pipeline.parse("prune{target=ffn ratio=0.5 criterion=wanda}").run(
        program, calibration=Calibration.from_text(text, tokenizer, samples=4, length=6)
    )
    assert result.program.parameter_count() < program.parameter_count()


def test_text_for_a_program_of_images_is_refused_with_what_to_give(
    text: Path, tokenizer: Any
) -> None:
    program = gp.capture(nn.Linear(4, 2), example_inputs=(torch.ones(2, 4),))
    data = Calibration.from_text(text, tokenizer)
    with pytest.raises(CalibrationError, match=r"'input', which cannot be .* FILE.safetensors"):
        gp.Pipeline.parse("prune{target=* ratio=0.5 criterion=wanda}").run(
            program, calibration=data
        )


def test_a_notebook_does_not_show_every_token() -> None:
    ids = torch.arange(40).view(2, 20)
    data = Calibration.from_batches([{"input_ids": ids, "labels": ids}])
    assert len(repr(data)) < 300 and "samples=2" in repr(data)

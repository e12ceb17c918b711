"""Files and shards written tensor by tensor."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from graphprune.errors import UsageError
from graphprune.weights.deferred import Deferred
from graphprune.weights.writing import write_file, write_shards


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return {
        "zeta": torch.randn(3, 4).bfloat16(),
        "flag": torch.tensor(True),
        "alpha": torch.randn(4, 3).mT,
        "none": torch.empty(0, 5),
        "números": torch.arange(3),
    }


def test_what_is_written_is_read_by_safetensors(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    write_file(tensors, tmp_path / "file")
    found = load_file(tmp_path / "file")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_shards_keep_the_order_and_have_an_index(tmp_path: Path) -> None:
    tensors = {f"w{at}": torch.full((100,), float(at)) for at in (3, 1, 2, 0)}
    told: list[int] = []
    names = write_shards(
        tensors, tmp_path, shard_size=900, track=lambda total: told.append(-total) or told.append
    )
    assert names == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    index = json.loads((tmp_path / names[-1]).read_text())
    assert index["metadata"] == {"total_parameters": 400, "total_size": 1600}
    assert index["weight_map"]["w3"] == index["weight_map"]["w1"] == names[0]
    assert torch.equal(load_file(tmp_path / names[1])["w0"], tensors["w0"])
    assert sum(told) == 0 and told[0] == -1600
    with pytest.raises(UsageError, match="'big' is no size"):
        write_shards(tensors, tmp_path, shard_size="big")


def test_writing_goes_on_after_the_last_complete_shard(tmp_path: Path) -> None:
    calls: list[str] = []

    def weight(name: str, fails: bool = False) -> Deferred:
        def make() -> torch.Tensor:
            calls.append(name)
            if fails:
                raise KeyboardInterrupt
            return torch.ones(100)

        return Deferred(make, (100,), torch.float32)

    with pytest.raises(KeyboardInterrupt):
        write_shards({"a": weight("a"), "b": weight("b", True)}, tmp_path, shard_size=400)
    write_shards({"a": weight("a"), "b": weight("b")}, tmp_path, shard_size=400)
    assert calls == ["a", "b", "b"]
    assert not list(tmp_path.glob("*.partial"))

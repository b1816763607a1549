"""Tables of names: what a file has under other names, in parts, transposed or reordered is what the model asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgewright.checkpoints.checkpoint import TensorInfo
from edgewright.checkpoints.named_store import NamedStore
from edgewright.checkpoints.names import Names, halves, heads_of_three, join, rename, split
from edgewright.errors import UserError
from edgewright.models.wrappers import text_model


class Stored:
    """Tensors in memory, as a store."""

    files: tuple[Path, ...] = ()

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors
        self.infos = {n: TensorInfo(n, t.dtype, tuple(t.shape)) for n, t in tensors.items()}

    def tensor(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self.tensors[name][start:stop].float()

    def sample(self, name: str) -> bytes:
        return name.encode()


def opened(names: Names, tensors: dict[str, torch.Tensor], wanted: set[str]) -> NamedStore:
    resolved = names.resolve(tensors, wanted)
    return NamedStore(Stored(tensors), resolved.pieces)


def holds(store: NamedStore, name: str, value: torch.Tensor) -> None:
    """The tensor, its shape, and any of its rows."""
    assert store.infos[name].shape == tuple(value.shape)
    assert torch.equal(store.tensor(name), value)
    rows = value.shape[0]
    for start in range(rows + 1):
        for stop in range(start, rows + 1):
            assert torch.equal(store.rows(name, start, stop), value[start:stop].float()), (start, stop)


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), st.booleans(), st.booleans())
def test_a_fused_weight_comes_apart(q: int, kv: int, columns: int, transposed: bool, root: bool) -> None:
    parts = {"model.layers.{}.q": 2 * q, "model.layers.{}.k": kv, "model.layers.{}.v": kv}
    names = Names(split("model.layers.{}.qkv", parts, transposed))
    whole, bias = torch.randn(2 * q + 2 * kv, columns), torch.randn(2 * q + 2 * kv)
    path = ("layers" if root else "model.layers") + ".11.qkv"
    file = {f"{path}.weight": whole.t().contiguous() if transposed else whole, f"{path}.bias": bias}
    wanted = {f"{n.format(11)}.{leaf}" for n in parts for leaf in ("weight", "bias")}
    store, at = opened(names, file, wanted), 0
    for name, rows in parts.items():
        holds(store, f"{name.format(11)}.weight", whole[at : at + rows])
        holds(store, f"{name.format(11)}.bias", bias[at : at + rows])
        at += rows


@given(st.lists(st.integers(1, 3), min_size=2, max_size=4))
def test_parts_are_joined_in_their_order(sizes: list[int]) -> None:
    tensors = {f"m.{i}.part{i}.weight": torch.randn(n, 3) for i, n in enumerate(sizes)}
    names = Names(*join([f"m.{i}.part{i}" for i in range(len(sizes))], "m.whole"))
    shuffled = dict(reversed(tensors.items()))
    holds(opened(names, shuffled, {"m.whole.weight"}), "m.whole.weight", torch.cat(list(tensors.values())))


@given(st.integers(1, 3), st.integers(1, 4))
def test_neighbours_become_halves(heads: int, pairs: int) -> None:
    """Row 2 j + h of a head in the file is row h * pairs + j of the head in the model."""
    value = torch.randn(heads, 2, pairs, 3)
    file = {"a.q.weight": value.transpose(1, 2).reshape(heads * 2 * pairs, 3)}
    holds(opened(Names(halves("a.q", heads)), file, {"a.q.weight"}), "a.q.weight", value.reshape(-1, 3))


@given(st.integers(1, 3), st.integers(1, 3))
def test_each_head_has_its_three(heads: int, dim: int) -> None:
    value = torch.randn(heads, 3, dim, 2)
    names, wanted = Names(heads_of_three("x", ("q", "k", "v"), heads)), {"q.weight", "k.weight", "v.weight"}
    store = opened(names, {"x.weight": value.reshape(-1, 2)}, wanted)
    for i, name in enumerate("qkv"):
        holds(store, f"{name}.weight", value[:, i].reshape(-1, 2))


def test_values_that_are_shifted() -> None:
    norm = torch.tensor([0.5, 2.0], dtype=torch.bfloat16)
    store = opened(Names(rename("n", "m", add=-1.0)), {"n.weight": norm}, {"m.weight"})
    assert store.infos["m.weight"].dtype == torch.float32
    holds(store, "m.weight", torch.tensor([-0.5, 1.0]))


def test_a_table_that_does_not_match_changes_nothing() -> None:
    """A checkpoint that has the model's own names, and one with names that nobody knows."""
    names = Names(rename("old.{}.a", "model.{}.b"))
    resolved = names.resolve(["model.1.b.weight", "old.2.a.weight", "stray.weight"], {"model.1.b.weight"})
    assert set(resolved.pieces) == {"model.1.b.weight", "old.2.a.weight", "stray.weight"}


def test_what_no_text_model_reads_is_left_out() -> None:
    present = ["model.visual.a.weight", "mtp.layers.0.w", "x.rotary_emb.inv_freq", "score.weight", "mine.z"]
    resolved = Names(ignored=("mine.*",)).resolve(present, set())
    assert resolved.left_out == ("model.visual.a.weight", "mtp.layers.0.w", "mine.z")
    assert list(resolved.pieces) == ["score.weight"]


@pytest.mark.parametrize(
    ("names", "tensors", "said"),
    [
        (
            Names(split("w", {"a": 2, "b": 3})),
            {"w.weight": torch.ones(4, 2)},
            r"w\.weight has shape \[4, 2\], of which a.weight cannot be a part .4 rows, 5 are",
        ),
        (
            Names(heads_of_three("w", ("a", "b", "c"), 2)),
            {"w.weight": torch.ones(7, 2)},
            "7 rows are not three for each",
        ),
        (Names(halves("w", 2, "a")), {"w.weight": torch.ones(6, 2)}, "6 rows are not pairs of 2 heads"),
        (
            Names(*join(["x", "y"], "a")),
            {"x.weight": torch.ones(2, 2), "y.weight": torch.ones(2, 3)},
            r"x\.weight, y\.weight differ in width",
        ),
        (
            Names(*join(["x", "y"], "a")),
            {"x.weight": torch.ones(2, 2), "y.weight": torch.ones(2, 2).half()},
            "differ in width or dtype",
        ),
        (Names(rename("x", "a")), {"x.weight": torch.ones(2), "a.weight": torch.ones(2)}, r"holds a\.weight twice"),
    ],
)
def test_what_does_not_fit_is_one_line(names: Names, tensors: dict[str, torch.Tensor], said: str) -> None:
    with pytest.raises(UserError, match=said):
        opened(names, tensors, {"a.weight", "b.weight", "c.weight"})


# ---- the text model of a multimodal checkpoint


def test_the_section_of_the_text_model_is_taken() -> None:
    config: dict[str, Any] = {
        "model_type": "gemma3",
        "eos_token_id": [1, 106],
        "tie_word_embeddings": False,
        "text_config": {"model_type": "gemma3_text", "hidden_size": 64, "eos_token_id": None},
        "vision_config": {"hidden_size": 32},
    }
    text, notes = text_model(config)
    assert text == {
        "model_type": "gemma3_text",
        "hidden_size": 64,
        "eos_token_id": [1, 106],
        "tie_word_embeddings": False,
    }
    assert notes == ["the text model of gemma3 is taken; images and sound are left out"]


def test_other_configs_stay_as_they_are() -> None:
    for config in ({"model_type": "llama", "text_config": {}}, {"model_type": "t5gemma2", "encoder": {}}):
        assert text_model(config) == (config, [])
    with pytest.raises(UserError, match="text_config is 'x', expected an object"):
        text_model({"model_type": "gemma3", "text_config": "x"})

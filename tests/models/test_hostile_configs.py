"""Every key that a family reads from config.json, replaced by a value that a stranger may put there: a model or one line."""

from __future__ import annotations

import json
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from helpers.hostile_values import HOSTILE, changed, deep_list, places
from helpers.tiny_families import FAMILIES

from edgewright.checkpoints.opening import open_checkpoint
from edgewright.errors import UserError
from edgewright.models.language_model import LanguageModel
from edgewright.models.registry import build, shorten
from edgewright.system.memory_peak import PeakAnonymous
from edgewright.system.reading import read_json_object, shown

CONFIGS: dict[str, dict[str, Any]] = {
    "t5gemma": tiny.T5GEMMA,
    "llama": tiny.LLAMA,
    "gemma3_text": tiny.GEMMA3,
    **FAMILIES,
    "eugen": tiny.LLAMA | {"edgewright": {"eugen": {"model.layers.1.mlp": {"m": 32, "k": 2}}}},
    "module": {"model_type": "module", "factory": "helpers.user_modules:unet"},
}
SAMPLE = 250
"""Changes of each family that are tried in every run; all of them are by `-m slow`."""

ENDLESS = 60  # seconds: a change takes milliseconds, and a big model that is accepted a few seconds
MOST_BYTES = 1 << 30


def changes(family: str) -> list[tuple[tuple[str | int, ...], Any]]:
    config = CONFIGS[family]
    read = (lambda c: None) if family == "module" else build
    return [(path, value) for path in places(config, read) for value in HOSTILE]


@pytest.fixture
def bounded() -> Iterator[None]:
    """Nothing of the test takes much memory or goes on for ever."""

    def stop(*_: object) -> None:
        raise TimeoutError("a config keeps `build` busy")

    before = signal.signal(signal.SIGALRM, stop)
    with PeakAnonymous() as peak:
        start = peak.bytes
        yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
    assert peak.bytes - start < MOST_BYTES


def built(config: dict[str, Any]) -> LanguageModel | None:
    """The model of a config; None where it is refused, in one line that can be printed."""
    signal.setitimer(signal.ITIMER_REAL, ENDLESS)
    try:
        model = build(config)
        model.check_lengths()
        return model
    except UserError as error:
        line = str(error)
        assert line.isprintable()
        assert 0 < len(line) < 600
        return None


def try_all(family: str, tried: list[tuple[tuple[str | int, ...], Any]]) -> None:
    for path, value in tried:
        try:
            model = built(changed(CONFIGS[family], path, value))
        except AssertionError:
            raise
        except Exception as error:
            raise AssertionError(f"{family}: {path} = {shown(value)}: {error!r:.200}") from error
        for parameter in model.parameters() if model is not None else ():
            assert parameter.is_meta


@pytest.mark.parametrize("family", CONFIGS)
def test_some_hostile_values(family: str, bounded: None) -> None:
    everything = changes(family)
    try_all(family, random.Random(family).sample(everything, min(SAMPLE, len(everything))))


@pytest.mark.slow
@pytest.mark.parametrize("family", CONFIGS)
def test_every_hostile_value(family: str, bounded: None) -> None:
    try_all(family, changes(family))


@pytest.mark.parametrize("family", [f for f in CONFIGS if f != "module"])
def test_a_million_layers_are_refused(family: str) -> None:
    def numbers(value: dict[str, Any], path: tuple[str | int, ...]) -> Iterator[tuple[str | int, ...]]:
        for key, item in value.items():
            if isinstance(item, dict):
                yield from numbers(item, (*path, key))
            elif key.endswith(("_layers", "n_layer")) and key not in (
                "num_kept_layers",
                "max_window_layers",
                "num_kv_shared_layers",
            ):
                yield (*path, key)

    found = list(numbers(CONFIGS[family], ()))
    assert found
    for path in found:
        with pytest.raises(UserError, match=r"expected an integer from 1 to 1024|multiple of 4"):
            build(changed(CONFIGS[family], path, 10**6))


def test_a_head_as_wide_as_the_model_takes_no_memory(bounded: None) -> None:
    """Frequencies of a head's rotation are real numbers, also where the model has no weights yet."""
    for family in ("modernbert", "modernbert-decoder"):
        config = CONFIGS[family] | {"hidden_size": 1 << 24, "num_attention_heads": 1}
        with pytest.raises(UserError, match="num_attention_heads"):
            build(config)


def test_sizes_whose_product_is_absurd_cost_nothing_and_fit_no_file(tmp_path: Path, bounded: None) -> None:
    folder = tiny.write_tiny_llama(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config |= {"vocab_size": 1 << 24, "hidden_size": 1 << 24, "intermediate_size": 1 << 24}
    (folder / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(str(folder))
    model = build(checkpoint.config)
    embedding = model.get_parameter("model.embed_tokens.weight")
    assert embedding.numel() == 1 << 48
    with pytest.raises(UserError, match=r"but config\.json asks for"):
        checkpoint.expect("model.embed_tokens.weight", tuple(embedding.shape))


@pytest.mark.parametrize("text", ['{"hidden_size": 1e999}', '{"hidden_size": NaN}', '{"hidden_size": -Infinity}'])
def test_what_json_calls_a_number(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    config = tiny.LLAMA | read_json_object(tmp_path / "config.json")
    with pytest.raises(UserError, match=r"hidden_size is (nan|-?inf), expected an integer"):
        build(config)


@pytest.mark.parametrize("levels", [64, 900, 100_000])
def test_json_that_is_nested_too_deep_is_refused(tmp_path: Path, levels: int) -> None:
    (tmp_path / "config.json").write_text('{"a":' + "[" * levels + "]" * levels + "}")
    with pytest.raises(UserError, match=r"nested deeper than 64 levels|not valid JSON"):
        read_json_object(tmp_path / "config.json")
    (tmp_path / "config.json").write_text('{"a":' + "[" * 60 + "]" * 60 + "}")
    read_json_object(tmp_path / "config.json")


def test_a_value_that_cannot_be_printed_is_named_by_its_kind() -> None:
    for value in (deep_list(sys.getrecursionlimit() * 5), 10 ** (sys.get_int_max_str_digits() + 1)):
        with pytest.raises(UserError, match=r"hidden_size is a (list|int) too large to print"):
            build(tiny.LLAMA | {"hidden_size": value})


def test_shorten_refuses_what_build_refuses() -> None:
    for family in ("t5gemma", "hgrn2", "phi4flash"):
        with pytest.raises(UserError):
            shorten(CONFIGS[family] | {"vocab_size": [], "decoder": 1}, 1)
        with torch.device("meta"):
            assert shorten(CONFIGS[family], 1)

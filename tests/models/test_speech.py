"""Whisper and Moonshine against transformers: what `save_pretrained` writes, opened from its file, in one call and in chunks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from helpers.oracle import randomise, run_step, states_of

from edgewright.audio.features import encoder_inputs, sample_sound
from edgewright.bundle import Generation, SoundSpec
from edgewright.errors import UserError
from edgewright.models.language_model import LanguageModel
from edgewright.models.loading import load_original
from edgewright.models.opening import open_model
from edgewright.models.registry import build, shorten
from edgewright.pipeline.generation import generation_of
from edgewright.runtimes.eager import EagerSession
from edgewright.runtimes.generate import generate
from edgewright.runtimes.speech_rules import prefix, rule_of
from edgewright.verification.transformers_model import Spoken, compare

WHISPER: dict[str, Any] = {
    "vocab_size": 96,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 80,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "max_source_positions": 30,
    "max_target_positions": 40,
    "num_mel_bins": 16,
    "pad_token_id": 1,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "decoder_start_token_id": 3,
    "begin_suppress_tokens": None,
}
MOONSHINE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 96,
    "encoder_num_hidden_layers": 2,
    "decoder_num_hidden_layers": 2,
    "encoder_num_attention_heads": 4,
    "decoder_num_attention_heads": 4,
    "max_position_embeddings": 40,
}


def whisper(**changes: Any) -> Any:
    return hf.WhisperForConditionalGeneration(hf.WhisperConfig(**WHISPER | changes))


def moonshine(**changes: Any) -> Any:
    return hf.MoonshineForConditionalGeneration(hf.MoonshineConfig(**MOONSHINE | changes))


CASES: dict[str, Callable[..., Any]] = {
    "moonshine": moonshine,
    "moonshine-biased": lambda: moonshine(attention_bias=True, hidden_size=64, pad_head_dim_to_multiple_of=8),
    "whisper": whisper,
    "whisper-scaled": lambda: whisper(scale_embedding=True, activation_function="relu"),
}


def written(case: str, folder: Path) -> Any:
    """transformers' model of a case with random weights, and its files."""
    torch.manual_seed(0)
    oracle = randomise(CASES[case](), seed=1)
    oracle.tie_weights()
    oracle.save_pretrained(folder)
    return oracle


def ours(folder: Path) -> LanguageModel:
    checkpoint = open_model(str(folder))
    model = build(checkpoint.config)
    load_original(model, checkpoint)
    return model


def sound_of(model: LanguageModel, seconds: tuple[float, ...] = (0.31,)) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Our encoder's inputs for made-up sounds, and their samples; those of rows cut to whole positions."""
    layout = model.sound_layout()
    assert layout is not None
    sound = SoundSpec(**vars(layout))
    samples = [sample_sound(sound, s, i) for i, s in enumerate(seconds)]
    if sound.row:
        samples = [s[: sound.row * (sound.real_rows(len(s)) - 1) + sound.tail] for s in samples]
    rows = [encoder_inputs(sound, s) for s in samples]
    longest = max(r[sound.port].shape[1] for r in rows)

    def longer(value: np.ndarray) -> np.ndarray:
        if not sound.row:
            return value
        return np.pad(value, [(0, 0), (0, longest - value.shape[1]), *[(0, 0)] * (value.ndim - 2)])

    return {n: torch.from_numpy(np.concatenate([longer(r[n]) for r in rows])) for n in rows[0]}, samples


def their_sound(samples: np.ndarray, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    if "input_features" in inputs:
        return {"input_features": inputs["input_features"]}
    return {"input_values": torch.from_numpy(samples)[None]}


def logits(model: LanguageModel, inputs: dict[str, Any], target: torch.Tensor, chunks: list[int]) -> torch.Tensor:
    graphs = {g.name: g for g in model.graphs()}
    (hidden,) = graphs["encoder"].call([inputs[p.name] for p in graphs["encoder"].inputs])
    cross = dict(zip(graphs["cross_kv"].output_names, graphs["cross_kv"].call([hidden]), strict=True))
    mask = inputs.get("encoder_mask", torch.ones(hidden.shape[:2], dtype=torch.bool))
    sizes = {"batch": len(target), "source": hidden.shape[1], "capacity": target.shape[1] + 3}
    states = states_of(graphs["decoder"], sizes) | cross
    out, past = [], 0
    for n in chunks:
        fed = {
            "input_ids": target[:, past : past + n],
            "past_length": torch.tensor([past]),
            "encoder_mask": mask,
            "logit_positions": torch.arange(n),
        }
        out.append(run_step(graphs["decoder"], fed, states))
        past += n
    return torch.cat(out, 1)


@pytest.mark.parametrize("case", sorted(CASES))
def test_a_saved_speech_model_is_what_transformers_computes(case: str, tmp_path: Path) -> None:
    oracle = written(case, tmp_path)
    model = ours(tmp_path)
    inputs, (samples,) = sound_of(model)
    target = torch.randint(4, 96, (1, 23), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        want = oracle(**their_sound(samples, inputs), decoder_input_ids=target).logits
    largest = want.abs().max()
    for chunks in ([23], [9, 1, 13]):
        got = logits(model, inputs, target, chunks)
        torch.testing.assert_close(got / largest, want / largest, atol=1e-5, rtol=0)


def test_sounds_of_several_lengths_side_by_side_are_each_what_it_is_alone(tmp_path: Path) -> None:
    written("moonshine", tmp_path)
    model = ours(tmp_path)
    both, _ = sound_of(model, (0.2, 0.45))
    assert len(set(both["encoder_mask"].sum(1).tolist())) == 2
    target = torch.randint(4, 96, (2, 9), generator=torch.Generator().manual_seed(2))
    together = logits(model, both, target, [9])
    for row in range(2):
        rows = int(both["encoder_mask"][row].sum()) + 2
        one = {n: v[row : row + 1, :rows] for n, v in both.items()}
        torch.testing.assert_close(together[row : row + 1], logits(model, one, target[row : row + 1], [9]))


def generation_config(oracle: Any, several: bool) -> Any:
    """One like Whisper's in a vocabulary of 96: 30 timestamps at its end."""
    values = {
        "no_timestamps_token_id": 64,
        "max_initial_timestamp_index": 4,
        "suppress_tokens": [11, 12, 13],
        "begin_suppress_tokens": [5, 1],
        "decoder_start_token_id": 3,
        "max_length": 40,
        "is_multilingual": several,
        "return_timestamps": False,
        "lang_to_id": {"<|en|>": 55, "<|de|>": 56},
        "task_to_id": {"transcribe": 58, "translate": 59},
    }
    for name, value in values.items():
        if several or not name.endswith("to_id"):
            setattr(oracle.generation_config, name, value)
    return oracle.generation_config


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("timestamps", [False, True])
def test_greedy_transcripts_are_those_of_transformers(several: bool, timestamps: bool, tmp_path: Path) -> None:
    """With suppressed tokens, language and task, and the grammar of timestamps."""
    oracle = written("whisper", tmp_path)
    config = generation_config(oracle, several)
    config.save_pretrained(tmp_path)
    checkpoint = open_model(str(tmp_path))
    model = ours(tmp_path)
    spec = generation_of(model, checkpoint, checkpoint.config)
    assert spec.speech is not None
    inputs, _ = sound_of(model)
    asked = {"language": "de", "task": "translate"} if several else {}
    want = oracle.generate(
        inputs["input_features"],
        return_timestamps=timestamps,
        do_sample=False,
        num_beams=1,
        force_unique_generate_call=True,  # else it goes on to a second window behind the last timestamp
        **asked,
    )[0].tolist()
    forced = prefix(spec.speech, asked.get("language"), asked.get("task"), timestamps)
    rule = rule_of(spec, spec.speech, timestamps)
    prompt = {n: v.numpy() for n, v in inputs.items()}
    speaking = spec.model_copy(update={"forced": forced})
    got = list(generate(EagerSession(model.graphs()), speaking, prompt, 36 - len(forced), rule=rule))
    assert len(got) > 3
    want = [t for t in want if t not in (3, 55, 56, 58, 59, 64)]  # transformers leaves the prefix out, or does not
    assert got == want[: len(got)]


def test_what_a_config_says_of_speech(tmp_path: Path) -> None:
    oracle = written("whisper", tmp_path)
    generation_config(oracle, True).save_pretrained(tmp_path)
    checkpoint = open_model(str(tmp_path))
    spec = generation_of(build(checkpoint.config), checkpoint, checkpoint.config)
    speech = spec.speech
    assert speech is not None
    assert spec.forced == (55, 58, 64)
    assert speech.languages == {"en": 55, "de": 56}
    assert speech.tasks == {"transcribe": 58, "translate": 59}
    assert (speech.suppress, speech.begin_suppress) == ((11, 12, 13), (5, 1))
    assert (speech.no_timestamps, speech.first_within) == (64, pytest.approx(0.08))
    assert (speech.sound.kind, speech.sound.window, speech.sound.positions) == ("log-mel", 9600, 30)


def test_a_moonshine_of_a_short_context_has_shorter_windows(tmp_path: Path) -> None:
    written("moonshine", tmp_path)
    checkpoint = open_model(str(tmp_path))
    model = build(checkpoint.config)
    sound = _speech(generation_of(model, checkpoint, checkpoint.config, 20)).sound
    assert (sound.positions, sound.window) == (20, 18 * 384 + 511)
    assert _speech(generation_of(model, checkpoint, checkpoint.config)).sound.positions == model.max_context
    with pytest.raises(UserError, match="--max-context 2 is too short for a sound"):
        generation_of(model, checkpoint, checkpoint.config, 2)


def _speech(spec: Generation) -> Any:
    assert spec.speech is not None
    return spec.speech


def test_rules_are_those_of_transformers(tmp_path: Path) -> None:
    """Random logits behind random beginnings of an answer."""
    from transformers.generation.logits_process import WhisperTimeStampLogitsProcessor

    oracle = written("whisper", tmp_path)
    config = generation_config(oracle, False)
    config.save_pretrained(tmp_path)
    checkpoint = open_model(str(tmp_path))
    spec = generation_of(build(checkpoint.config), checkpoint, checkpoint.config)
    speech = _speech(spec).model_copy(update={"suppress": (), "begin_suppress": ()})
    rule = rule_of(spec, speech, timestamps=True)
    theirs = WhisperTimeStampLogitsProcessor(config, begin_index=1)
    rng = np.random.default_rng(0)
    beginnings = [[], [65], [70], [65, 20], [65, 20, 70], [65, 20, 70, 70], [65, 20, 70, 70, 30], [20, 30], [65, 65]]
    for said in beginnings:
        for tilt in (0.0, 3.0, -3.0):
            scores = rng.normal(size=96).astype(np.float32)
            scores[65:] += tilt
            want = theirs(torch.tensor([[3, *said]]), torch.from_numpy(scores.copy())[None])[0].numpy()
            np.testing.assert_array_equal(rule(said, scores), want)


@pytest.mark.parametrize("family", ["moonshine", "whisper"])
def test_a_rehearsal_has_fewer_layers_in_both_stacks(family: str) -> None:
    config = (WHISPER if family == "whisper" else MOONSHINE) | {"model_type": family}
    model = build(shorten(config, 1))
    assert [len(layers) for layers in model.stacks().values()] == [1, 1]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (WHISPER | {"model_type": "whisper", "encoder_attention_heads": 3}, "encoder_attention_heads is 3"),
        (WHISPER | {"model_type": "whisper", "num_mel_bins": 4096}, "num_mel_bins is 4096"),
        (WHISPER | {"model_type": "whisper", "max_source_positions": 1 << 20}, "max_source_positions is 1048576"),
        (WHISPER | {"model_type": "whisper", "activation_function": "mish"}, "activation 'mish' is not supported"),
        (MOONSHINE | {"model_type": "moonshine", "encoder_num_key_value_heads": 2}, "encoder_num_key_value_heads is 2"),
        (MOONSHINE | {"model_type": "moonshine", "hidden_size": 0}, "hidden_size is 0"),
    ],
)
def test_a_bad_config_is_refused_by_its_key(config: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        build(config)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("suppress_tokens", [96], r"suppress_tokens is \[96\], expected a list of tokens below 96"),
        ("begin_suppress_tokens", "5", "begin_suppress_tokens is '5'"),
        ("no_timestamps_token_id", -1, "no_timestamps_token_id is -1"),
        ("lang_to_id", {"en": 5}, "lang_to_id has 'en', expected such as"),
        ("lang_to_id", {"<|en|>": 1 << 40}, "lang_to_id is"),
        ("task_to_id", [1], r"task_to_id is \[1\]"),
        ("max_initial_timestamp_index", 0.5, "max_initial_timestamp_index is 0.5"),
    ],
)
def test_a_bad_generation_config_is_refused_by_its_key(key: str, value: object, said: str, tmp_path: Path) -> None:
    written("whisper", tmp_path)
    checkpoint = open_model(str(tmp_path))
    checkpoint.generation[key] = value
    with pytest.raises(UserError, match=said):
        generation_of(build(checkpoint.config), checkpoint, checkpoint.config)


@pytest.mark.parametrize("case", ["moonshine", "whisper"])
def test_against_transformers_compares_made_up_sounds(case: str, tmp_path: Path) -> None:
    """As `export --against transformers` does; and another activation in one layer is seen."""
    oracle = written(case, tmp_path)
    found = compare(str(tmp_path), lambda _: None)
    assert found["differs"] is None, found
    assert found["max_relative_error"] < 1e-5
    model: Any = ours(tmp_path)
    ids = torch.randint(4, 90, (2, 24), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        both = Spoken(model, oracle)
        assert float((both.ours(ids) - both.theirs(ids)).abs().max()) < 1e-3
        model.model.encoder.layers[0].mlp.act = torch.relu
        assert float((both.ours(ids) - both.theirs(ids)).abs().max()) > 1e-2

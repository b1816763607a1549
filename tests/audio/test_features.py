"""Samples as what a speech encoder reads, against transformers' feature extractor."""

from __future__ import annotations

import numpy as np
import pytest
import transformers as hf

from edgewright.audio.features import encoder_inputs, log_mel, mel_filters, sample_sound
from edgewright.audio.files import Samples
from edgewright.bundle import SoundSpec

WHISPER = SoundSpec(kind="log-mel", rate=16000, window=480_000, positions=1500, mels=80, fft=400, hop=160)
MOONSHINE = SoundSpec(kind="samples", rate=16000, window=384 * 50 + 511, positions=52, row=384, tail=511)


def sounds() -> dict[str, Samples]:
    rng = np.random.default_rng(1)
    time = np.arange(16000 * 3) / 16000
    return {
        "a click": np.eye(1, 4000, 17, dtype=np.float32)[0],
        "longer than a window": sample_sound(WHISPER, 30.0, 3).repeat(2)[: 16000 * 31],
        "noise": rng.normal(0, 0.1, 16000 * 5).astype(np.float32),
        "one sample": np.ones(1, np.float32),
        "silence": np.zeros(16000, np.float32),
        "speech-like": sample_sound(WHISPER, 4.0, 0),
        "two tones": (0.3 * np.sin(2 * np.pi * 440 * time) + 0.1 * np.sin(2 * np.pi * 3000 * time)).astype(np.float32),
    }


@pytest.mark.parametrize("name", sorted(sounds()))
@pytest.mark.parametrize("mels", [80, 128])
def test_a_spectrogram_is_that_of_transformers(name: str, mels: int) -> None:
    """Within 1e-5 of its numpy code, which counts in double precision as this does."""
    extractor = hf.WhisperFeatureExtractor(feature_size=mels)
    samples = sounds()[name]
    padded = np.zeros(480_000, np.float32)
    padded[: len(samples)] = samples[:480_000]
    want = extractor._np_extract_fbank_features(padded[None], "cpu")[0]
    got = log_mel(WHISPER.model_copy(update={"mels": mels}), samples)
    assert got.shape == want.shape == (mels, 3000)
    np.testing.assert_allclose(got, want, atol=1e-5, rtol=0)


def test_a_spectrogram_is_near_what_transformers_computes_in_single_precision() -> None:
    samples = sounds()["speech-like"]
    want = hf.WhisperFeatureExtractor()(samples, sampling_rate=16000, return_tensors="np")["input_features"][0]
    np.testing.assert_allclose(log_mel(WHISPER, samples), want, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("rate", "fft", "mels"), [(8000, 200, 40), (16000, 400, 80), (22050, 512, 64)])
def test_mel_filters_are_those_of_transformers(rate: int, fft: int, mels: int) -> None:
    from transformers.audio_utils import mel_filter_bank

    want = mel_filter_bank(1 + fft // 2, mels, 0.0, min(8000.0, rate / 2), rate, norm="slaney", mel_scale="slaney")
    np.testing.assert_allclose(mel_filters(rate, fft, mels), want, atol=1e-12)


@pytest.mark.parametrize("count", [1, 511, 512, 895, 896, 384 * 50 + 511, 384 * 60])
def test_rows_hold_the_samples_and_mask_what_lies_behind(count: int) -> None:
    samples = np.arange(1, count + 1, dtype=np.float32)
    made = encoder_inputs(MOONSHINE, samples)
    values, mask = made["input_values"], made["encoder_mask"]
    kept = min(count, MOONSHINE.window)
    np.testing.assert_array_equal(values.reshape(-1)[:kept], samples[:kept])
    assert not values.reshape(-1)[kept:].any()
    real = int(mask.sum())
    assert mask.shape[1] == real + 2 <= MOONSHINE.positions
    assert mask[0, :real].all()
    assert real == max(1, -(-(kept - 511) // 384))  # every sample is read by a real position


def test_a_made_up_sound_is_the_same_again_and_another_with_another_seed() -> None:
    one, again, other = (sample_sound(WHISPER, 0.5, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert len(one) == 8000
    assert np.abs(one - other).max() > 0.05

"""A sound of any length as text: windows, and the next one by the timestamps of the last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.whisper.generation_whisper import WhisperGenerationMixin

from edgewright.bundle import Generation, SoundSpec, SpeechSpec
from edgewright.errors import UserError
from edgewright.runtimes.session import Array, StateBuffers
from edgewright.runtimes.transcribe import Segment, SpeechOptions, quiet_end, segments_of, transcribe

SOUND = SoundSpec(kind="log-mel", rate=16000, window=480_000, positions=1500, mels=80, fft=400, hop=160)
START = 100
SPEECH = SpeechSpec(
    sound=SOUND,
    no_timestamps=START - 1,
    languages={"en": 90, "de": 91},
    tasks={"transcribe": 93, "translate": 94},
    first_within=1.0,
)
END = 80
SPEC = Generation(
    task="seq2seq",
    decoder_start=89,
    forced=(90, 93, 99),
    eos_ids=(END,),
    vocab=START + 1501,
    max_context=448,
    max_new_tokens=100,
    speech=SPEECH,
)


def at(seconds: float) -> int:
    """The token of a time."""
    return START + round(seconds * 50)


class Scripted:
    """A session whose answers are written down: one a window. heard: what the model finds of each language."""

    def __init__(self, answers: Sequence[Sequence[int]], heard: Mapping[int, float] | None = None) -> None:
        self.answers, self.heard = [*answers], heard or {}
        self.windows: list[Array] = []
        self.prefixes: list[list[int]] = []

    def new_state(self, batch: int, capacity: int, graph: str = "decoder") -> StateBuffers:
        return {"capacity": capacity}

    def run(self, graph: str, inputs: Mapping[str, Array], state: StateBuffers) -> dict[str, Array]:
        if graph == "encoder":
            self.windows.append(inputs["input_features"])
            return {"encoder_hidden": np.zeros((1, 1500, 8), np.float32)}
        if graph == "cross_kv":
            return {}
        ids = inputs["input_ids"][0].tolist()
        logits = np.full((1, 1, SPEC.vocab), -50.0, np.float32)
        if ids == [89]:
            for token, value in self.heard.items():
                logits[0, 0, token] = value
            return {"logits": logits}
        if ids[0] == 89:
            self.prefixes.append(ids[1:])
            self._left = [*self.answers[len(self.prefixes) - 1], END]
        logits[0, 0, self._left.pop(0)] = 50.0
        return {"logits": logits}


def samples(seconds: float) -> Array:
    return np.full(int(seconds * 16000), 0.01, np.float32)


def test_a_short_sound_is_one_window_without_timestamps() -> None:
    session = Scripted([[5, 6, 7]])
    assert list(transcribe(session, SPEC, samples(4.0), SpeechOptions(language="de"))) == [Segment(0.0, 4.0, (5, 6, 7))]
    assert session.prefixes == [[91, 93, 99]]


def test_timestamps_divide_a_window() -> None:
    session = Scripted([[at(0), 5, 6, at(1.5), at(2), 7, at(3.24)]])
    got = list(transcribe(session, SPEC, samples(4.0), SpeechOptions("en", "translate", timestamps=True)))
    assert [(round(s.start, 6), round(s.end, 6), s.tokens) for s in got] == [(0.0, 1.5, (5, 6)), (2.0, 3.24, (7,))]
    assert session.prefixes == [[90, 94]]
    assert len(session.windows) == 1


def test_a_long_sound_goes_on_where_the_last_whole_segment_ended() -> None:
    """The second window begins at 28 s, where the first one's pair of timestamps is; what was cut off is read again."""
    answers = [[at(0), 5, at(12), at(12), 6, at(28), at(28), 7], [at(0), 7, 8, at(6)]]
    session = Scripted(answers)
    got = list(transcribe(session, SPEC, samples(35.0), SpeechOptions("en")))
    assert [(round(s.start, 3), round(s.end, 3), s.tokens) for s in got] == [
        (0.0, 12.0, (5,)),
        (12.0, 28.0, (6,)),
        (28.0, 34.0, (7, 8)),
    ]
    assert session.prefixes == [[90, 93], [90, 93]]  # long sounds are read by timestamps, also where none are wanted


def test_a_window_that_tells_no_end_is_read_whole() -> None:
    session = Scripted([[at(0), 5, 6], [at(0), 7, at(2)]])
    got = list(transcribe(session, SPEC, samples(33.0), SpeechOptions("en", timestamps=True)))
    assert [(round(s.start, 3), round(s.end, 3), s.tokens) for s in got] == [(0.0, 30.0, (5, 6)), (30.0, 32.0, (7,))]


def test_a_pair_at_time_0_does_not_read_the_same_window_for_ever() -> None:
    assert segments_of(SPEECH, [at(0), 5, at(0), at(0), 6], 480_000)[1] == 480_000


def test_the_language_that_is_heard_is_taken() -> None:
    session = Scripted([[5]], heard={90: 1.0, 91: 3.0})
    assert [s.tokens for s in transcribe(session, SPEC, samples(1.0))] == [(5,)]
    assert session.prefixes == [[91, 93, 99]]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (SpeechOptions(language="tlh"), "--language 'tlh' is not one of this model's: en, de"),
        (SpeechOptions(task="sing"), "the model does not sing; it knows: transcribe, translate"),
    ],
)
def test_what_the_model_does_not_know_is_refused(options: SpeechOptions, said: str) -> None:
    with pytest.raises(UserError, match=said):
        list(transcribe(Scripted([[5]]), SPEC, samples(1.0), options))


def test_a_model_of_one_language_takes_no_other() -> None:
    plain = SPEC.model_copy(update={"speech": SpeechSpec(sound=SOUND)})
    for options, said in (
        (SpeechOptions(language="en"), "--language 'en': the model knows one language"),
        (SpeechOptions(task="translate"), "--translate: the model transcribes alone"),
        (SpeechOptions(timestamps=True), "--timestamps: this model tells no times"),
    ):
        with pytest.raises(UserError, match=said):
            list(transcribe(Scripted([[5]]), plain, samples(1.0), options))
    text = SPEC.model_copy(update={"speech": None})
    with pytest.raises(UserError, match="reads text, not sound"):
        list(transcribe(Scripted([[5]]), text, samples(1.0)))


def test_a_window_is_cut_where_it_is_quiet() -> None:
    sound = SoundSpec(kind="samples", rate=16000, window=384 * 100 + 511, positions=102, row=384, tail=511)
    window = np.sin(np.arange(sound.window)).astype(np.float32)
    window[35_000:36_000] *= 0.01
    assert 35_000 < quiet_end(sound, window) < 36_000
    assert quiet_end(sound, window[:40]) == 40


def test_windows_of_a_model_without_timestamps_follow_each_other() -> None:
    """Every sample is read once, and the number of tokens follows the length of a window."""
    sound = SoundSpec(kind="samples", rate=16000, window=384 * 50 + 511, positions=52, row=384, tail=511)
    spec = SPEC.model_copy(update={"speech": SpeechSpec(sound=sound, tokens_a_second=4.0), "forced": ()})

    class Rows(Scripted):
        def run(self, graph: str, inputs: Mapping[str, Array], state: StateBuffers) -> dict[str, Array]:
            if graph == "encoder":
                self.windows.append(inputs["input_values"])
                return {"encoder_hidden": np.zeros((1, inputs["input_values"].shape[1], 8), np.float32)}
            logits = np.zeros((1, 1, SPEC.vocab), np.float32)
            logits[..., 7] = 1.0
            return {} if graph == "cross_kv" else {"logits": logits}

    session = Rows([])
    spoken = (np.random.default_rng(0).normal(size=50_000) * 0.1).astype(np.float32)
    got = list(transcribe(session, spec, spoken))
    read = np.concatenate([w.reshape(-1) for w in session.windows])
    np.testing.assert_array_equal(read[read != 0], spoken)
    assert [s.start for s in got[1:]] == [s.end for s in got[:-1]]
    assert got[-1].end == 50_000 / 16000
    assert [len(s.tokens) for s in got] == [int(4 * (s.end - s.start)) + 1 for s in got]


def test_segments_are_those_of_transformers() -> None:
    rng = np.random.default_rng(3)
    for _ in range(300):
        said = _answer(rng)
        theirs, frames = WhisperGenerationMixin._retrieve_segment(
            seek_sequence=torch.tensor(said),
            seek_outputs=[{}],
            time_offset=torch.zeros(1, dtype=torch.float64),
            timestamp_begin=START,
            seek_num_frames=torch.tensor([3000]),
            time_precision=0.02,
            time_precision_features=0.01,
            input_stride=2,
            prev_idx=0,
            idx=0,
            return_token_timestamps=False,
            decoder_input_ids=torch.zeros(1, 3),
        )
        ours, read = segments_of(SPEECH, said, 480_000)
        want: list[Any] = [
            (
                round(float(s["start"]), 6),
                round(float(s["end"]), 6),
                tuple(t for t in s["tokens"].tolist() if t < START),
            )
            for s in theirs
        ]
        assert [(round(s.start, 6), round(s.end, 6), s.tokens) for s in ours] == want, said
        assert read == (int(frames) * 160 or 480_000)


def _answer(rng: np.random.Generator) -> list[int]:
    """Tokens as the grammar of timestamps allows them."""
    time, said = 0, [at(0)]
    for _ in range(rng.integers(1, 5)):
        said += rng.integers(1, 60, rng.integers(1, 4)).tolist()
        if rng.random() < 0.3:
            break
        time += int(rng.integers(0, 300))
        said.append(START + time)
        if rng.random() < 0.7:
            time += int(rng.integers(0, 40))
            said.append(START + time)
        else:
            break
    return said

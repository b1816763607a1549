"""`Generation`s of a causal and of an encoder-decoder model."""

from __future__ import annotations

from edgewright.bundle import Generation
from helpers.formula_session import VOCAB

CAUSAL = Generation(task="causal", eos_ids=(1,), vocab=VOCAB, max_context=64, max_new_tokens=8)


SEQ2SEQ = Generation(
    task="seq2seq", decoder_start=2, eos_ids=(1,), pad_id=0, vocab=VOCAB, max_context=64, max_new_tokens=8
)

"""Makes llama.cpp's Q4_0 file of the benchmark: `python quantize_llamacpp.py IN.gguf OUT.gguf`, by the peers' Python.

Every matrix becomes Q4_0 (symmetric, blocks of 32, fp16 scales), the tied token embedding included, which llama.cpp by
itself would keep at Q6_K or Q8_0: the peers then read the same number of weight bytes per token.
"""

from __future__ import annotations

import ctypes
import sys

import llama_cpp


def quantize(source: str, target: str) -> None:
    """Writes `target` from `source` through llama.cpp's own quantizer. Raises RuntimeError when it refuses."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread = 1
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    params.token_embedding_type = params.output_tensor_type = llama_cpp.GGML_TYPE_Q4_0
    params.allow_requantize = True  # the source holds Q4_1 and Q8_0
    params.pure = True
    status = llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params))
    if status:
        raise RuntimeError(f"llama_model_quantize returned {status} for {source}")


if __name__ == "__main__":
    quantize(sys.argv[1], sys.argv[2])

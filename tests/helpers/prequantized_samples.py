"""Weights as the libraries themselves quantize them, with the values that they give back: tests/checkpoints/*.safetensors.

`python tests/helpers/prequantized_samples.py` writes the file anew, where mlx, bitsandbytes and compressed-tensors are installed
(it was made with 0.32.4, 0.50.2 and 0.20.1); the tests read it without them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

SAMPLES = Path(__file__).parent.parent / "checkpoints" / "prequantized_samples.safetensors"
EXPECTED = "expected"

Sample = tuple[dict[str, Any], dict[str, torch.Tensor]]
"""Keys of config.json, and the tensors of one weight `m.weight`, with what the library makes of them as "expected"."""


def read_samples() -> dict[str, Sample]:
    """Name of a case -> its sample."""
    samples: dict[str, Sample] = {}
    with safe_open(SAMPLES, framework="pt") as file:
        for case, config in file.metadata().items():
            names = [name for name in file.keys() if name.startswith(f"{case}/")]  # noqa: SIM118
            samples[case] = json.loads(config), {n.removeprefix(f"{case}/"): file.get_tensor(n) for n in names}
    return samples


def _mlx(bits: int) -> Sample:
    import mlx.core as mx
    import numpy as np

    codes, scales, biases = mx.quantize(mx.array(torch.randn(5, 64).numpy()), group_size=32, bits=bits)
    expected = np.array(mx.dequantize(codes, scales, biases, group_size=32, bits=bits))
    parts = {
        "m.weight": torch.from_numpy(np.array(codes)).view(torch.uint32),
        "m.scales": torch.from_numpy(np.array(scales)),
        "m.biases": torch.from_numpy(np.array(biases)),
    }
    return {"quantization": {"bits": bits, "group_size": 32}}, parts | {EXPECTED: torch.from_numpy(expected)}


def _bitsandbytes(kind: str, nested: bool) -> Sample:
    from bitsandbytes import functional

    codes, state = functional.quantize_4bit(torch.randn(5, 50), quant_type=kind, compress_statistics=nested)
    parts = {"m.weight": codes} | {f"m.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    block = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
    return {"quantization_config": block}, parts | {EXPECTED: functional.dequantize_4bit(codes, state)}


def _bitsandbytes8() -> Sample:
    from bitsandbytes import functional

    codes, scales, _ = functional.int8_vectorwise_quant(torch.randn(5, 50).half())
    parts = {"m.weight": codes, "m.SCB": scales, "m.weight_format": torch.tensor(0, dtype=torch.uint8)}
    block = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    return {"quantization_config": block}, parts | {EXPECTED: functional.int8_vectorwise_dequant(codes, scales)}


def _compressed(form: str, **weights: Any) -> Sample:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    arguments = QuantizationArgs(**weights)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    weight = torch.randn(34, 64)
    low_high = {
        "group": lambda: (weight.unflatten(1, (-1, 32)).amin(-1), weight.unflatten(1, (-1, 32)).amax(-1)),
        "channel": lambda: (weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)),
        "tensor": lambda: (weight.amin().reshape(1), weight.amax().reshape(1)),
        "block": lambda: (-torch.rand(3, 2) - 2, torch.rand(3, 2) + 2),
    }[weights["strategy"]]()
    scale, zero = calculate_qparams(*low_high, arguments)
    compressor = BaseCompressor.get_value_from_registry(form)
    parts = compressor.compress({"weight": weight, "weight_scale": scale, "weight_zero_point": zero}, scheme)
    expected = compressor.decompress(dict(parts), scheme)["weight"]
    group = {"targets": ["Linear"], "weights": arguments.model_dump(mode="json"), "input_activations": None}
    block = {"quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed"}
    block |= {"config_groups": {"group_0": group}}
    return {"quantization_config": block}, {f"m.{key}": value for key, value in parts.items()} | {EXPECTED: expected}


def main() -> None:
    torch.manual_seed(0)
    samples = {f"mlx {bits}": _mlx(bits) for bits in (2, 3, 4, 5, 6, 8)}
    samples |= {f"{kind} nested={n}": _bitsandbytes(kind, n) for kind in ("nf4", "fp4") for n in (False, True)}
    samples["int8"] = _bitsandbytes8()
    for symmetric in (True, False):
        for bits, strategy, more in (
            (4, "group", {"group_size": 32}),
            (4, "channel", {}),
            (8, "group", {"group_size": 32}),
        ):
            case = f"packed {bits} {strategy} symmetric={symmetric}"
            samples[case] = _compressed(
                "pack-quantized", num_bits=bits, type="int", symmetric=symmetric, strategy=strategy, **more
            )
        samples[f"packed 3 symmetric={symmetric}"] = _compressed(
            "pack-quantized", num_bits=3, type="int", symmetric=symmetric, strategy="channel"
        )
        for strategy in ("channel", "tensor"):
            samples[f"int {strategy} symmetric={symmetric}"] = _compressed(
                "int-quantized", num_bits=8, type="int", symmetric=symmetric, strategy=strategy
            )
    for strategy, more in (("channel", {}), ("tensor", {}), ("block", {"block_structure": [16, 48]})):
        samples[f"float {strategy}"] = _compressed(
            "float-quantized", num_bits=8, type="float", symmetric=True, strategy=strategy, **more
        )
    tensors = {f"{case}/{n}": t.contiguous() for case, (_, parts) in samples.items() for n, t in parts.items()}
    save_file(tensors, SAMPLES, metadata={case: json.dumps(config) for case, (config, _) in samples.items()})


if __name__ == "__main__":
    main()

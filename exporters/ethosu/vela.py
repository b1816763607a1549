"""Vela, Arm's compiler for the Ethos-U: from TOSA to the NPU's command stream, and Vela's own estimate.

The estimate is Vela's model of the NPU and its memories (vendor-simulated): no device and no cycle-accurate model runs.
"""

from __future__ import annotations

import contextlib
import csv
import io
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import UserError


@dataclass(frozen=True)
class Family:
    """Sizes in multiply-accumulators, and the system and memory mode of Vela's own vela.ini for its estimate.

    narrow_matmul: whether the NPU multiplies two activations in 8 bits only.
    """

    sizes: tuple[int, ...]
    system: str
    memory: str
    narrow_matmul: bool


FAMILIES = {
    "ethos-u55": Family((32, 64, 128, 256), "Ethos_U55_High_End_Embedded", "Shared_Sram", True),
    "ethos-u65": Family((256, 512), "Ethos_U65_High_End", "Dedicated_Sram_384KB", True),
    # ExecuTorch's default, Sram_Only, puts weights in SRAM too: the estimate would have no DRAM in it
    "ethos-u85": Family((128, 256, 512, 1024, 2048), "Ethos_U85_SYS_DRAM_Mid", "Dedicated_Sram_384KB", False),
}


def family(accelerator: str) -> Family:
    """The family of a configuration. Raises UserError for an unknown one: Vela would end the process."""
    name, _, size = accelerator.rpartition("-")
    match = FAMILIES.get(name)
    if match is None or size not in map(str, match.sizes):
        known = ", ".join(f"{n}-{s}" for n, f in FAMILIES.items() for s in f.sizes)
        raise UserError(f"no Ethos-U configuration {accelerator!r}; choose from {known}")
    return match


def command_stream(tosa: bytes, accelerator: str) -> tuple[bytes, dict[str, object]]:
    """(the command stream of a TOSA flatbuffer, Vela's estimate). Raises UserError if Vela refuses it."""
    from executorch.backends.arm.arm_vela import vela_compile

    with tempfile.TemporaryDirectory() as folder, quiet():
        try:
            compiled: bytes = vela_compile(
                tosa, list(compile_spec(accelerator).compiler_flags), intermediate_path=folder
            )
        except (Exception, SystemExit) as error:
            raise UserError(f"Vela does not compile this for {accelerator} ({str(error)[:120]})") from error
        return compiled, estimate(Path(folder))


def compile_spec(accelerator: str) -> Any:
    """ExecuTorch's own compile spec, with the system and memory mode. Raises UserError as `family` does."""
    from executorch.backends.arm.ethosu import EthosUCompileSpec

    mode = family(accelerator)
    return EthosUCompileSpec(accelerator, mode.system, mode.memory)


def estimate(folder: Path) -> dict[str, object]:
    """Vela's summary under `folder`: times, traffic in bytes, memory in bytes, and the mode they are for."""
    (path,) = (folder / "output").glob("*_summary_*.csv")
    with path.open() as file:
        (row,) = csv.DictReader(file)
    traffic = {f"{m}_bytes_moved": int(float(row[f"{m}_total_bytes"])) for m in ("sram", "dram", "off_chip_flash")}
    used = {f"{m}_bytes_used": int(float(row[f"{m}_memory_used"]) * 1024) for m in ("sram", "dram", "off_chip_flash")}
    return {
        "accelerator": row["accelerator_configuration"],
        "system_config": row["system_config"],
        "memory_mode": row["memory_mode"],
        "clock_hz": int(float(row["core_clock"])),
        "cycles": int(float(row["cycles_total"])),
        "npu_cycles": int(float(row["cycles_npu"])),
        "milliseconds": float(row["inference_time"]) * 1e3,
        "multiply_accumulates": int(float(row["nn_macs"])),
        "weight_bytes_encoded": int(float(row["total_npu_encoded_weights"])),
        **traffic,
        **used,
    }


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Vela prints its summary on standard output, which is for results alone."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield

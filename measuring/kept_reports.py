"""The reports in a bundle's folder, as far as they are read again. A stranger may have written them."""

from __future__ import annotations

from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..bundle import REPORTS, Bundle
from ..errors import UserError
from ..system.reading import MEBIBYTE, one_line, read_json_object
from .measure import DeviceResult

_LARGEST = 64 * MEBIBYTE

Number = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Nodes = dict[str, dict[str, Annotated[int, Field(ge=0)]]]


class _Read(BaseModel):
    """A part of a report that is read; the rest of it is passed over."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Agreement(_Read):
    """As in `verification.report`."""

    max_relative_error: Number | None
    mean_kl: Number
    top1: Number
    rms: Number | None = None
    positions: int = 0


class Text(_Read):
    """Scores on a text."""

    perplexity: Number
    mean_kl: Number
    top1: Number


class Placed(_Read):
    """Where an artefact's nodes run: graph -> op -> number."""

    accelerator: str = ""
    accelerated: Nodes = {}
    host: Nodes = {}
    fallback: Nodes = {}
    known: bool = True
    source: str = ""


class Checked(_Read):
    """One artefact that was verified."""

    format: str
    passed: bool
    activations: str
    lowering: Agreement
    shipped: Agreement
    placement: Placed
    how: str = ""
    task_accuracy: Number | None = None
    text: Text | None = None


class Rounding(_Read):
    """As `pipeline.rounding_loss` found it at export."""

    kl: Number
    top1: Number
    positions: int
    data: str
    vectors: bool = False


class Verified(_Read):
    """`reports/verify.json`, or `reports/export.json`."""

    targets: list[Checked]
    quantization: Agreement | None = None
    task_size: int = 0
    original_task_accuracy: Number | None = None
    original_text: Text | None = None
    dequantized_text: Text | None = None
    quality: Rounding | None = None

    @property
    def loss(self) -> Agreement | None:
        """The quantized weights beside the original ones: as `verify` found it, else as the export did."""
        if self.quantization is not None or self.quality is None or self.quality.vectors:
            return self.quantization
        found = {"mean_kl": self.quality.kl, "top1": self.quality.top1, "positions": self.quality.positions}
        return Agreement.model_validate({"max_relative_error": None} | found)


class Row(_Read):
    """A measured row."""

    test: str
    median: Positive
    tokens_per_s: Positive | None = None
    std: Positive = 0.0
    repeats: int = 0


class LayerTime(_Read):
    """Kernel time of one layer."""

    layer: str
    ms: Positive
    calls: int
    share: Positive


class OpTime(_Read):
    """Kernel time of one op."""

    op: str
    unit: str = ""
    ms: Positive
    calls: int
    share: Positive


class Memory(_Read):
    """Bytes of the process."""

    peak_resident: int = 0
    anonymous_after_load: int = 0
    anonymous_after_run: int = 0


class Host(_Read):
    """The machine that was measured."""

    cpu: str = "this machine"
    threads: int | str = ""


class Measured(_Read):
    """One target of `reports/profile.json`."""

    rows: list[Row]
    kind: str = "measured"
    load_first_s: Positive | None = None
    load_warm_s: Positive | None = None
    memory: Memory = Memory()
    ops: dict[str, list[OpTime]] = {}
    layers: dict[str, dict[str, list[LayerTime]]] = {}
    profiled: dict[str, int] = {}
    host: Host = Host()


class Profiled(_Read):
    """`reports/profile.json`."""

    targets: dict[str, Measured]
    not_measured: dict[str, str] = {}


class Devices(_Read):
    """`reports/devices.json`: devices behind links."""

    devices: list[DeviceResult]


Kind = TypeVar("Kind", bound=_Read)


def last_check(bundle: Bundle) -> tuple[Verified | None, str]:
    """The report of the last `verify`, else of the check at export, and which of them it is. Errors as of `kept_report`."""
    verified = kept_report(bundle, "verify", Verified)
    return (kept_report(bundle, "export", Verified), "export") if verified is None else (verified, "verify")


def kept_report(bundle: Bundle, name: str, kind: type[Kind]) -> Kind | None:
    """A report in the bundle; None where there is none. Raises UserError for a damaged one."""
    file = bundle.path / REPORTS / f"{name}.json"
    if not file.is_file():
        return None
    try:
        return kind.model_validate(read_json_object(file, _LARGEST))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        again = "profile --device" if name == "devices" else name
        raise UserError(f"{file}: {one_line(where, 120)}: {one_line(first['msg'], 120)}; run '{again}' again") from None

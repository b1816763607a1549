"""The device profile: what a device can do, every number with its unit and its source.

A profile is a TOML file, which strangers may have written: its size is limited, it is checked strictly, and a faulty one is refused
with one line.
"""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..errors import UserError
from ..system.reading import nearest, one_line, read_text
from ..system.writing import write_file
from .lines import line_of

_SIZE_LIMIT = 32 << 10  # a profile has a few KiB
_LIBRARY = Path(__file__).parent
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LONG_NUMBER = re.compile(r"[0-9A-Fa-f_]{400}")
_MOST_DOTS = 2000  # of a line: a key of 16,000 parses for seconds and takes a gigabyte


def _printable(text: str) -> str:
    # So no terminal escape gets into `devices show`, and no control character into a TOML string.
    if not text.isprintable() or not text.strip():
        raise ValueError("must be one printable line, not blank")
    return text


def _file_name(text: str) -> str:
    if not _NAME.fullmatch(text) or text.endswith(".toml"):
        raise ValueError(
            "a name is 1-64 letters, digits, '.', '_', '-', starts with a letter or digit, and does not end in .toml"
        )
    return text


def _host(text: str) -> str:
    # It is an argument of ssh or adb, which take a leading '-' as an option.
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.@:-]{0,254}", text):
        raise ValueError("a host is letters, digits and '_.@:-', and does not start with '-'")
    return text


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


Line = Annotated[str, Field(max_length=1000), AfterValidator(_printable)]


class Quantity(_Strict):
    """A positive number with its unit and its source.

    source: begins with "measured by …" (a tool run on this device, with date and version), "vendor: …" or "public: …".
    kind: measured (by a tool on this device), vendor (the maker's page or data sheet), public (somebody else's page, repository or
    rows), or derived (computed from other numbers; the source says from which and how).
    confidence: high (the maker's own words, or our measurement), medium (a derivation, or one good public source), low (a leak, an
    estimate, or sources that disagree).
    """

    value: float = Field(gt=0, allow_inf_nan=False)
    unit: Line
    source: Line
    kind: Literal["measured", "vendor", "public", "derived"]
    confidence: Literal["high", "medium", "low"] = "high"

    @model_validator(mode="after")
    def _source_fits_kind(self) -> Self:
        if not self.source.startswith(("measured by ", "vendor: ", "public: ")):
            raise ValueError("source must start with 'measured by ', 'vendor: ' or 'public: '")
        fits = {"measured": "measured by ", "vendor": "vendor: ", "public": "public: ", "derived": ""}
        if not self.source.startswith(fits[self.kind]):
            raise ValueError(f"kind {self.kind} does not fit the source")
        return self


def _in(unit: str, integer: bool = False) -> AfterValidator:
    def check(quantity: Quantity) -> Quantity:
        if quantity.unit != unit:
            raise ValueError(f"unit is {quantity.unit!r}, must be {unit!r}")
        if integer and not quantity.value.is_integer():
            raise ValueError(f"{quantity.value} is not a whole number of {unit}")
        return quantity

    return AfterValidator(check)


Bytes = Annotated[Quantity, _in("bytes", integer=True)]
BytesPerSecond = Annotated[Quantity, _in("bytes/s")]
GigaFlops = Annotated[Quantity, _in("GFLOP/s")]
GigaOps = Annotated[Quantity, _in("GOP/s")]
Watts = Annotated[Quantity, _in("W")]
JoulesPerByte = Annotated[Quantity, _in("J/byte")]
JoulesPerOp = Annotated[Quantity, _in("J/op")]
Cores = Annotated[Quantity, _in("cores", integer=True)]
Threads = Annotated[Quantity, _in("threads", integer=True)]


class Rates(_Strict):
    """Peak rates of matrix products by dtype: GFLOP/s, for int8 GOP/s; a multiply-add counts as 2."""

    fp32: GigaFlops | None = None
    fp16: GigaFlops | None = None
    int8: GigaOps | None = None


class OpEnergy(_Strict):
    """Energy of one operation by dtype, in joules; a multiply-add counts as 2."""

    fp32: JoulesPerOp | None = None
    fp16: JoulesPerOp | None = None
    int8: JoulesPerOp | None = None


class Power(_Strict):
    """What a unit draws while it decodes. boundary: what the figure counts, from the supply rail out to the wall."""

    watts: Watts
    boundary: Literal["rail", "package", "device", "wall"]


class Cluster(_Strict):
    """Equal cores of a CPU. clock: their highest sustained clock, where it is known."""

    name: Line
    cores: Cores
    clock: Annotated[Quantity, _in("GHz")] | None = None


class ComputeUnit(_Strict):
    """A CPU, GPU or NPU. Rates are with all its threads, those named `one_thread` with one.

    clusters: of a CPU, the fastest first. isa: the extensions that its matrix products use (dotprod, i8mm, sme, avx2-vnni …).
    htp_version: of a Hexagon NPU. sm: of an NVIDIA GPU, as 87. bandwidth: of main memory, as this unit alone was seen to reach.

    weight_stream: bytes/s of 4-bit weights (codes and scales) multiplied with one row of activations; it bounds decoding.
    prefill_rate: GOP/s of products of many rows with 4-bit weights; it bounds prefill. Measured on the kernel alone they are upper
    bounds for a model; derived from a model's tokens/s they are lower bounds for the kernel. `source` says which.
    """

    name: Line
    kind: Literal["cpu", "gpu", "npu"]
    clusters: Annotated[tuple[Cluster, ...], Field(strict=False)] = ()
    isa: Annotated[tuple[Line, ...], Field(strict=False)] = ()
    htp_version: Annotated[int, Field(ge=60, le=200)] | None = None
    sm: Annotated[int, Field(ge=50, le=200)] | None = None
    bandwidth: BytesPerSecond | None = None
    power: Power | None = None
    cores: Cores | None = None
    threads: Threads | None = None
    peak: Rates | None = None
    peak_one_thread: Rates | None = None
    weight_stream: BytesPerSecond | None = None
    weight_stream_one_thread: BytesPerSecond | None = None
    prefill_rate: GigaOps | None = None
    prefill_rate_one_thread: GigaOps | None = None
    energy_per_op: OpEnergy | None = None


class Memory(_Strict):
    """Main memory. bandwidth: of reading. copy_rate: bytes read plus bytes written."""

    size: Bytes | None = None
    bandwidth: BytesPerSecond | None = None
    bandwidth_one_thread: BytesPerSecond | None = None
    copy_rate: BytesPerSecond | None = None
    energy_per_byte: JoulesPerByte | None = None


class Target(_Strict):
    """A target that the device runs. unit: the one that it runs on, where it is not the target's own.

    bits: the weight widths that it is known to hold natively; None: not known.
    """

    name: Literal["onnx", "executorch", "coreml", "tensorrt", "qnn", "ethosu"]
    unit: Literal["cpu", "gpu", "npu"] | None = None
    # TOML has lists, which strict mode does not take as tuples.
    bits: Annotated[tuple[Annotated[int, Field(ge=1, le=16)], ...], Field(strict=False, min_length=1)] | None = None
    source: Line


class Reach(_Strict):
    """How to reach the device. host: for ssh user@host, which is required; for adb the serial number, which is not."""

    by: Literal["local", "adb", "ssh"]
    host: Annotated[str, AfterValidator(_host)] | None = None

    @model_validator(mode="after")
    def _host_where_needed(self) -> Self:
        if self.by == "ssh" and self.host is None:
            raise ValueError("ssh needs a host")
        if self.by == "local" and self.host is not None:
            raise ValueError("local takes no host")
        return self


class DeviceProfile(_Strict):
    """What a device can do. A number without a source is absent (None), never guessed.

    alias_of: the profile of which this is another name: one machine, or one measurement published under two names.
    published_as: the names that tables of measurements give the device.
    """

    name: Annotated[str, AfterValidator(_file_name)]
    kind: Literal["host", "phone", "tablet", "laptop", "board", "gpu", "npu", "browser"]
    soc: Line | None = None
    alias_of: Annotated[str, AfterValidator(_file_name)] | None = None
    published_as: Annotated[tuple[Line, ...], Field(strict=False)] = ()
    description: Line | None = None
    reach: Reach | None = None
    memory: Memory = Memory()
    units: Annotated[tuple[ComputeUnit, ...], Field(strict=False, min_length=1)]
    targets: Annotated[tuple[Target, ...], Field(strict=False)] = ()

    def unit(self, kind: Literal["cpu", "gpu", "npu"]) -> ComputeUnit:
        """The first compute unit of this kind. Raises UserError if the device has none."""
        for unit in self.units:
            if unit.kind == kind:
                return unit
        raise UserError(f"device {self.name} has no {kind}; it has {', '.join(u.kind for u in self.units)}")

    def target(self, name: str) -> Target | None:
        """The profile's entry of this target; None if the device is not known to run it."""
        return next((t for t in self.targets if t.name == name), None)


def load(name_or_path: str | Path) -> DeviceProfile:
    """The profile of that name (the user's before the library's), or the one in that file.

    A Path, a string with a path separator, or one that ends in .toml is a file. Raises UserError for an unknown name and for a file
    that is absent, too large, not TOML, or not a profile.
    """
    text = str(name_or_path)
    if isinstance(name_or_path, Path) or text.endswith(".toml") or "/" in text or os.sep in text:
        return _read(Path(name_or_path))
    known = _named()
    if text not in known:
        raise UserError(
            f"unknown device {one_line(text, 80)!r}{nearest(text, known)}; `edgewright devices list` names the {len(known)} known; "
            "or give the path of a .toml file"
        )
    return _read_named(known[text])


def list_profiles() -> list[DeviceProfile]:
    """The user's profiles and the library's, by name; a user's profile hides the library's of the same name. Raises UserError."""
    return [_read_named(path) for _, path in sorted(_named().items())]


def parse(text: str, origin: str) -> DeviceProfile:
    """The profile in a TOML text. Raises UserError, which names `origin`, the key and its line, if it is none."""
    for number, written in enumerate(text.split("\n"), 1):
        strange = "a number of hundreds of digits" if _LONG_NUMBER.search(written) else None
        strange = strange or ("thousands of dots" if written.count(".") > _MOST_DOTS else None)
        if strange:
            raise UserError(f"{one_line(origin)}, line {number}: {strange}, which no profile has; mend it")
    try:
        return DeviceProfile.model_validate(tomllib.loads(text))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the profile"
        reason = one_line(f"{where}: {first['msg']}", 200)
        line, _ = line_of(text, first["loc"])
        raise UserError(
            f"{one_line(origin)}, line {line}: not a device profile ({reason}); mend it, or run `edgewright devices measure`"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{one_line(origin)}: not valid TOML ({one_line(error, 100)}); mend it") from None


def to_toml(profile: DeviceProfile) -> str:
    """The profile as TOML; `parse` of it is an equal profile."""
    return "\n".join(_table(profile, "")).strip("\n") + "\n"


def save(profile: DeviceProfile, path: Path) -> None:
    """Write the profile to `path`, and make its folder; the file appears complete or not at all. Raises UserError if it cannot."""
    make_folder(Path(path))
    write_file(Path(path), to_toml(profile))


def make_folder(path: Path) -> None:
    """Make the folder that a file is to lie in. Raises UserError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise UserError(f"{one_line(path)} cannot be written ({reason}); choose another -o") from None


def user_path(name: str) -> Path:
    """Where the user's profile of this name is kept: `$XDG_CONFIG_HOME/edgewright/devices`, or ~/.config. Raises UserError."""
    try:
        return user_folder() / f"{_file_name(name)}.toml"
    except ValueError as error:
        raise UserError(f"device name {one_line(name, 80)!r}: {error}") from None


def user_folder() -> Path:
    """Where the user's profiles lie. Raises UserError where there is no home."""
    configured = os.environ.get("XDG_CONFIG_HOME", "")
    # By the XDG rules a relative path is ignored.
    if os.path.isabs(configured):
        return Path(configured) / "edgewright" / "devices"
    try:
        return Path.home() / ".config" / "edgewright" / "devices"
    except RuntimeError:
        raise UserError("no home directory; set XDG_CONFIG_HOME to an absolute path") from None


def _named() -> dict[str, Path]:
    """Name -> file, of the library and of the user; the user's file is taken where both have one."""
    return {
        p.stem: p
        for folder in (_LIBRARY, user_folder())
        for p in sorted(folder.glob("*.toml"))
        if _NAME.fullmatch(p.stem)
    }


def _read_named(path: Path) -> DeviceProfile:
    profile = _read(path)
    if profile.name != path.stem:
        line, _ = line_of(read_text(path, _SIZE_LIMIT), ("name",))
        raise UserError(
            f"{one_line(path)}, line {line}: the profile is named {profile.name!r}; name the file {profile.name}.toml"
        )
    return profile


def _read(path: Path) -> DeviceProfile:
    return parse(read_text(path, _SIZE_LIMIT), str(path))


def _table(model: BaseModel, path: str) -> list[str]:
    """The lines of one table: first the values, then the sub-tables, as TOML requires."""
    lines: list[str] = []
    below: list[str] = []
    for key, value in model:
        full = f"{path}.{key}" if path else key
        if value == type(model).model_fields[key].default:
            continue  # an absent key means the default
        if isinstance(value, Quantity):
            inner = ", ".join(f"{k} = {_scalar(v)}" for k, v in value)
            lines.append(f"{key} = {{ {inner} }}")
        elif isinstance(value, BaseModel):
            below += ["", f"[{full}]", *_table(value, full)]
        elif isinstance(value, tuple) and isinstance(value[0], BaseModel):
            for item in value:
                below += ["", f"[[{full}]]", *_table(item, full)]
        elif isinstance(value, tuple):
            lines.append(f"{key} = [{', '.join(_scalar(v) for v in value)}]")
        else:
            lines.append(f"{key} = {_scalar(value)}")
    return lines + below


def _scalar(value: object) -> str:
    if isinstance(value, str):
        # The models hold printable text alone, so only these two need escaping.
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{escaped}"'
    if isinstance(value, float) and value.is_integer() and value < 2**53:
        return str(int(value))
    return repr(value)

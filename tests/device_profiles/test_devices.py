"""Device profiles: the schema, the round trip through TOML, hostile files, the library, and measuring the host."""

from __future__ import annotations

import os
import re
import string
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from edgewright.device_profiles import host_tasks, profile
from edgewright.device_profiles import measure_host as measure
from edgewright.device_profiles.measure_host import measure_host
from edgewright.device_profiles.profile import (
    DeviceProfile,
    Quantity,
    list_profiles,
    load,
    parse,
    save,
    to_toml,
    user_path,
)
from edgewright.errors import UserError

LIBRARY = {path.stem for path in Path(profile.__file__).parent.glob("*.toml")}


@pytest.fixture(autouse=True)
def own_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test sees or touches the real user's profiles."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config" / "edgewright" / "devices"


def text_of(**changed: str) -> str:
    """A small valid profile as TOML, some of its parts replaced."""
    parts = {
        "name": 'name = "thing"',
        "kind": 'kind = "board"',
        "reach": '[reach]\nby = "ssh"\nhost = "me@thing.local"',
        "size": 'value = 1024, unit = "bytes", source = "vendor: data sheet", kind = "vendor"',
        "unit": 'name = "Cortex"\nkind = "cpu"',
        "target": 'name = "onnx"\nbits = [4, 8]\nsource = "public: docs"',
    }
    parts |= changed
    return (
        f"{parts['name']}\n{parts['kind']}\n{parts['reach']}\n[memory]\nsize = {{ {parts['size']} }}\n"
        f"[[units]]\n{parts['unit']}\n[[targets]]\n{parts['target']}\n"
    )


def quantities(model: BaseModel) -> list[tuple[str, Quantity]]:
    """Every number of a profile with the name of its field."""
    collected: list[tuple[str, Quantity]] = []
    for key, value in model:
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, Quantity):
                collected.append((key, item))
            elif isinstance(item, BaseModel):
                collected += quantities(item)
    return collected


# --- the round trip ---------------------------------------------------------------------------------------------------

_line = st.text(st.characters(codec="utf-8"), min_size=1, max_size=30).filter(lambda s: s.isprintable() and s.strip())


def _quantity(unit: str, integer: bool = False) -> st.SearchStrategy[dict[str, Any]]:
    number = st.integers(1, 2**60).map(float) if integer else st.floats(5e-324, 1.7e308, allow_nan=False)
    kinds = st.sampled_from(
        [("measured by ", "measured"), ("vendor: ", "vendor"), ("public: ", "public"), ("public: ", "derived")]
    )
    return st.builds(lambda v, k, s: {"value": v, "unit": unit, "source": k[0] + s, "kind": k[1]}, number, kinds, _line)


def _some(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=fields)


_rates = _some(fp32=_quantity("GFLOP/s"), fp16=_quantity("GFLOP/s"), int8=_quantity("GOP/s"))
_unit = st.fixed_dictionaries(
    {"name": _line, "kind": st.sampled_from(["cpu", "gpu", "npu"])},
    optional={
        "cores": _quantity("cores", integer=True),
        "peak": _rates,
        "peak_one_thread": _rates,
        "weight_stream": _quantity("bytes/s"),
        "prefill_rate": _quantity("GOP/s"),
        "energy_per_op": _some(int8=_quantity("J/op")),
    },
)
_target = st.fixed_dictionaries(
    {"name": st.sampled_from(["onnx", "executorch", "coreml", "tensorrt", "qnn"]), "source": _line},
    optional={"bits": st.lists(st.integers(1, 16), min_size=1, max_size=4)},
)
_reach = st.sampled_from(
    [{"by": "local"}, {"by": "adb"}, {"by": "adb", "host": "0A1B"}, {"by": "ssh", "host": "a@b.c"}]
)
_profiles = st.fixed_dictionaries(
    {
        "name": st.text(string.ascii_letters + string.digits, min_size=1, max_size=64),
        "kind": st.sampled_from(["host", "phone", "tablet", "laptop", "board", "gpu", "npu", "browser"]),
        "units": st.lists(_unit, min_size=1, max_size=3),
    },
    optional={
        "description": _line,
        "reach": _reach,
        "memory": _some(size=_quantity("bytes", integer=True), energy_per_byte=_quantity("J/byte")),
        "targets": st.lists(_target, max_size=3),
    },
).map(DeviceProfile.model_validate)


@given(_profiles)
@settings(max_examples=150, deadline=None)
def test_toml_round_trip_is_exact(device: DeviceProfile) -> None:
    text = to_toml(device)
    again = parse(text, "x")
    assert again == device
    assert to_toml(again) == text


# --- what is refused --------------------------------------------------------------------------------------------------

_Q = 'unit = "bytes", source = "vendor: x", kind = "vendor"'


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (text_of(size=f"value = 0, {_Q}"), "greater than 0"),
        (text_of(size=f"value = nan, {_Q}"), "memory.size.value"),
        (text_of(size=f"value = inf, {_Q}"), "memory.size.value"),
        (text_of(size=f"value = 1.5, {_Q}"), "whole number"),
        (text_of(size=f"value = true, {_Q}"), "memory.size.value"),
        (text_of(size=f'value = "1024", {_Q}'), "memory.size.value"),
        (text_of(size=f"value = {'9' * 399}, {_Q}"), "memory.size.value"),
        (text_of(size=f"value = 1e{'9' * 300}, {_Q}"), "memory.size.value"),
        (text_of(size=f"value = {'9' * 400}, {_Q}"), "hundreds of digits"),
        (text_of(size=f"value = {'9' * 5000}, {_Q}"), "hundreds of digits"),
        (text_of(size=f"value = 0x{'f' * 5000}, {_Q}"), "hundreds of digits"),
        (text_of(size=f"value = 0b{'1_' * 5000}1, {_Q}"), "hundreds of digits"),
        (text_of(size=f"value = 0.{'9' * 5000}, {_Q}"), "hundreds of digits"),
        (text_of(size=f"value = 1e-{'9' * 5000}, {_Q}"), "hundreds of digits"),
        ("a" + ".a" * 16_000 + " = 1", "thousands of dots"),
        ("[" + "a." * 16_000 + "a]", "thousands of dots"),
        ("a" + ".a" * 2000 + " = 1", "name"),
        ("[[units]]\n" * 3000, "name"),
        ("".join(f"[t{i}]\n" for i in range(3000)), "name"),
        (text_of(size='value = 1, unit = "GB", source = "vendor: x", kind = "vendor"'), "must be 'bytes'"),
        (text_of(size='value = 1, unit = "bytes", kind = "vendor"'), "memory.size.source"),
        (text_of(size='value = 1, unit = "bytes", source = "I think", kind = "vendor"'), "source must start"),
        (text_of(size='value = 1, unit = "bytes", source = "vendor: x", kind = "measured"'), "does not fit"),
        (text_of(size='value = 1, unit = "bytes", source = "public: x", kind = "vendor"'), "does not fit"),
        (text_of(size="value = 1"), "memory.size"),
        (text_of(name='name = "../../etc/passwd"'), "a name is"),
        (text_of(name='name = "a.toml"'), "a name is"),
        (text_of(kind='kind = "toaster"'), "kind"),
        (text_of(kind='kind = "board"\nsurprise = 1'), "surprise"),
        (text_of(reach='[reach]\nby = "ssh"'), "ssh needs a host"),
        (text_of(reach='[reach]\nby = "local"\nhost = "a"'), "local takes no host"),
        (text_of(reach='[reach]\nby = "ssh"\nhost = "-oProxyCommand=reboot"'), "a host is"),
        (text_of(reach='[reach]\nby = "ssh"\nhost = "a b"'), "a host is"),
        (text_of(unit='name = "\\u001b[2J"\nkind = "cpu"'), "printable"),
        (text_of(unit='name = "two\\nlines"\nkind = "cpu"'), "printable"),
        (text_of(target='name = "onnx"\nbits = [0]\nsource = "public: x"'), "targets.0.bits"),
        (text_of(target='name = "onnx"\nbits = []\nsource = "public: x"'), "targets.0.bits"),
        ('name = "thing"\nkind = "board"\nunits = []', "units"),
        ("", "name"),
        ("a = " + "[" * 20000, "not valid TOML"),
        ("\x00", "not valid TOML"),
        ("name = \x1b[31m", "not valid TOML"),
    ],
)
def test_a_bad_profile_is_one_line(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(says)) as caught:
        load(path)
    message = str(caught.value)
    assert "bad.toml" in message
    assert message.isprintable()
    assert len(message) < 700


def test_the_good_text_is_good() -> None:
    device = parse(text_of(), "x")
    assert device.memory.size is not None
    assert device.memory.size.value == 1024
    assert device.unit("cpu").name == "Cortex"
    target = device.target("onnx")
    assert target is not None
    assert target.bits == (4, 8)
    assert device.target("qnn") is None
    with pytest.raises(UserError, match="thing has no npu; it has cpu"):
        device.unit("npu")


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"#" * (64 << 10)])
def test_bytes_that_are_no_profile(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"bad\.toml: (not UTF-8|65536 bytes)"):
        load(path)


def test_what_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a regular file is needed"):
        load(tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        load(tmp_path / "absent.toml")
    # Opening a pipe nobody writes to would wait for ever.
    os.mkfifo(tmp_path / "pipe.toml")
    with pytest.raises(UserError, match="a regular file is needed"):
        load(str(tmp_path / "pipe.toml"))


# --- where profiles are kept ------------------------------------------------------------------------------------------


def test_an_unknown_name_says_where_the_known_are() -> None:
    with pytest.raises(UserError, match=r"unknown device 'nokia-3310'; `edgewright devices list` names the \d+ known"):
        load("nokia-3310")
    with pytest.raises(UserError, match=r"unknown device 'samsung-galaxy-s52'.*did you mean samsung-galaxy-s2\d"):
        load("samsung-galaxy-s52")


def test_the_user_comes_before_the_library(own_config: Path) -> None:
    assert {p.name for p in list_profiles()} == LIBRARY
    mine = load("samsung-galaxy-s25").model_copy(update={"description": "mine"})
    save(mine, user_path(mine.name))
    save(parse(text_of(), "x"), user_path("thing"))
    assert user_path("thing") == own_config / "thing.toml"
    assert load("samsung-galaxy-s25").description == "mine"
    assert [p.name for p in list_profiles()] == sorted(LIBRARY | {"thing"})
    # Named differently inside: `list` would show a name that `show` does not know.
    (own_config / "thing.toml").rename(own_config / "other.toml")
    with pytest.raises(UserError, match=r"named 'thing'; name the file thing\.toml"):
        load("other")


def test_config_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for ignored in ("", "relative/path"):
        monkeypatch.setenv("XDG_CONFIG_HOME", ignored)
        assert user_path("a") == tmp_path / ".config" / "edgewright" / "devices" / "a.toml"
    with pytest.raises(UserError, match=r"device name '\.\./a'"):
        user_path("../a")


def test_save_is_whole_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "thing.toml"
    device = parse(text_of(), "x")
    save(device, path)
    before = path.read_text()
    assert load(path) == device

    def full(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(profile.os, "replace", full)
    with pytest.raises(UserError, match=r"thing\.toml cannot be written \(No space left on device\)"):
        save(device.model_copy(update={"description": "changed"}), path)
    assert path.read_text() == before
    assert os.listdir(path.parent) == ["thing.toml"]


# --- measuring --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured() -> DeviceProfile:
    """A measurement too short to mean anything, on buffers that fit the cache: its shape is what is tested."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "buffer_bytes", lambda cache: 8 << 20)
        return measure_host(0.01)


def test_measured_numbers_have_units_and_sources(measured: DeviceProfile) -> None:
    cpu = measured.unit("cpu")
    assert (measured.name, measured.kind) == ("host", "host")
    assert measured.reach is not None
    assert measured.reach.by == "local"
    assert cpu.peak is not None
    assert cpu.peak_one_thread is not None
    must = [measured.memory.bandwidth, measured.memory.bandwidth_one_thread, measured.memory.copy_rate, cpu.threads]
    must += [cpu.peak.fp32, cpu.peak.int8, cpu.peak_one_thread.fp32, cpu.peak_one_thread.int8]
    must += [cpu.weight_stream, cpu.weight_stream_one_thread, cpu.prefill_rate, cpu.prefill_rate_one_thread]
    assert None not in must
    for _, quantity in quantities(measured):
        assert quantity.value > 0
        assert quantity.kind == "measured"
        assert re.match(
            r"measured by edgewright devices measure on \d{4}-\d\d-\d\d with edgewright \S+, ", quantity.source
        )
    assert parse(to_toml(measured), "x") == measured


def test_measured_widths_are_those_onnxruntime_computes_right(measured: DeviceProfile) -> None:
    onnx = measured.target("onnx")
    assert onnx is not None
    assert onnx.bits == (2, 4, 8)


def test_work_is_counted_as_documented(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_tasks, "_product", lambda *args, **kwargs: lambda: None)
    assert host_tasks.fp32_task(1).work == host_tasks.int8_task(1).work == 2 * 256 * 2048 * 2048
    # 8 MiB of codes: [4096 rows, 4096 columns] at 4 bits, and one fp32 scale for each 64 columns.
    assert host_tasks.stream_task(8 << 20, 1).work == (8 << 20) + 4096 * 64 * 4


def test_rounds_are_interleaved() -> None:
    order: list[str] = []
    tasks = [host_tasks.Task(key, "", 1.0, lambda key=key: order.append(key)) for key in "abc"]
    times = measure._interleaved(tasks, 1e-9)
    assert "".join(order) == "abc" + "abc" + "cba" + "abc"  # one untimed run, then the three rounds
    assert {key: len(runs) for key, runs in times.items()} == {"a": 3, "b": 3, "c": 3}


def test_quantity_is_the_median_rate() -> None:
    task = host_tasks.Task("fp32, 1 threads", "a product", 6e9, lambda: None)
    quantity = measure._quantity(task, [1.0, 2.0, 3.0, 2.0, 60.0])
    assert (quantity.value, quantity.unit) == (3.0, "GFLOP/s")
    assert "median of 5 interleaved runs, quartiles 2 and 3" in quantity.source
    assert measure._quantity(host_tasks.Task("read, 1 threads", "", 8.0, lambda: None), [2.0]).unit == "bytes/s"


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), 1e9])
def test_seconds_out_of_range(seconds: float) -> None:
    with pytest.raises(UserError, match="--seconds"):
        measure_host(seconds)


def test_no_torch_in_this_room() -> None:
    rooms = "edgewright.device_profiles.measure_host, edgewright.device_profiles.profile"
    code = f"import sys, {rooms}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

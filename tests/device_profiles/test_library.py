"""The shipped profiles: hardware facts alone, each number with an honest source."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from edgewright.device_profiles import profile
from edgewright.device_profiles.profile import DeviceProfile, Quantity, parse
from edgewright.targets.storage import native_bits

ROOT = Path(__file__).parents[2]
FILES = {path.stem: path for path in sorted(Path(profile.__file__).parent.glob("*.toml"))}
PUBLISHED = {
    "Arduino VENTUNO Q": "arduino-ventuno-q",
    "Dragonwing IQ-9075 EVK": "dragonwing-iq-9075-evk",
    "Dragonwing IQ-X7181": "dragonwing-iq-x7181",
    "Dragonwing Q-8750": "dragonwing-q-8750",
    "SA8255P ADP": "sa8255p-adp",
    "SA8295P ADP": "sa8295p-adp",
    "SA8650P ADP": "sa8650p-adp",
    "SA8775P ADP": "sa8775p-adp",
    "Samsung Galaxy S25": "samsung-galaxy-s25",
    "Samsung Galaxy S26": "samsung-galaxy-s26",
    "Snapdragon X Elite CRD": "snapdragon-x-elite-crd",
    "Snapdragon X2 Elite CRD": "snapdragon-x2-elite-crd",
}
"""The devices of qai-hub-models 0.65.0's rows of language models, and their profiles."""


def shipped(name: str) -> DeviceProfile:
    return parse(FILES[name].read_text(encoding="utf-8"), name)


def quantities(model: BaseModel, path: str = "") -> list[tuple[str, Quantity]]:
    """Every number of a profile with the path of its key."""
    collected: list[tuple[str, Quantity]] = []
    for key, value in model:
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, Quantity):
                collected.append((f"{path}{key}", item))
            elif isinstance(item, BaseModel):
                collected += quantities(item, f"{path}{key}.")
    return collected


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_shipped_profile_is_honest(name: str) -> None:
    text = FILES[name].read_text(encoding="utf-8")
    device = shipped(name)
    assert device.name == name
    assert device.alias_of is None or (device.alias_of in FILES and shipped(device.alias_of).alias_of is None)
    numbers = quantities(device)
    # Stated in the file, not left to the default.
    assert text.count("confidence = ") == text.count("value = ") == len(numbers)
    for path, quantity in numbers:
        assert re.match(r"(vendor|public): \S+ ?\S+", quantity.source), path
        assert "recalled" not in quantity.source, path
        assert quantity.kind != "vendor" or quantity.source.startswith("vendor: "), path
        assert quantity.kind != "derived" or quantity.confidence != "high" or quantity.source.startswith("vendor: "), (
            path
        )
        low, high = BOUNDS[quantity.unit]
        assert low <= quantity.value <= high, path
    for unit in device.units:  # what one runtime reached with one model is not hardware
        assert unit.weight_stream is unit.prefill_rate is None
        assert unit.htp_version is None or unit.kind == "npu"
        assert unit.sm is None or unit.kind == "gpu"
    for target in device.targets:
        assert set(target.bits or ()) <= set(native_bits(target.name)), target.name
        assert re.match(r"(vendor|public): ", target.source), target.name
    assert len({target.name for target in device.targets}) == len(device.targets)


BOUNDS = {
    "bytes": (1 << 30, 1 << 40),
    "bytes/s": (1e9, 3e12),
    "GHz": (0.1, 6.999),
    "cores": (1, 32),
    "threads": (1, 64),
    "GFLOP/s": (1, 1e6),
    "GOP/s": (100, 1e6),
    "W": (0.5, 600),
}


def test_derived_bandwidths_follow_from_their_sources() -> None:
    """Transfers a second times the width of the bus, where the source names both."""
    checked = 0
    for name in FILES:
        for path, quantity in quantities(shipped(name)):
            match = re.search(r"([0-9.]+) MT/s x (\d+) bit / 8", quantity.source)
            if match:
                assert quantity.value == pytest.approx(float(match[1]) * 1e6 * int(match[2]) / 8), (name, path)
                checked += 1
    assert checked >= 3


def test_every_published_device_has_one_profile() -> None:
    names: dict[str, list[str]] = {}
    for name in FILES:
        for published in shipped(name).published_as:
            names.setdefault(published, []).append(name)
    assert names == {published: [name] for published, name in PUBLISHED.items()}


def test_the_library_is_as_large_as_the_docs_say() -> None:
    page = (ROOT / "docs" / "devices.md").read_text(encoding="utf-8")
    assert len(FILES) >= 40
    assert f"{len(FILES)} profiles" in page


def test_the_schema_file_is_the_type() -> None:
    written = json.loads((ROOT / "docs" / "device-profile.schema.json").read_text(encoding="utf-8"))
    assert written == DeviceProfile.model_json_schema()

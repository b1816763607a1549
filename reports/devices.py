"""What `devices list` and `devices show` print."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..device_profiles.profile import DeviceProfile, to_toml
from .tables import table, text


def device_rows(profiles: Sequence[DeviceProfile]) -> list[dict[str, Any]]:
    """A row for each device; None where its profile does not say. memory in bytes, bandwidth in bytes/s."""
    return [
        {
            "name": device.name,
            "kind": device.kind,
            "chip": device.soc,
            "alias_of": device.alias_of,
            "published_as": list(device.published_as),
            "memory": None if device.memory.size is None else device.memory.size.value,
            "bandwidth": None if device.memory.bandwidth is None else device.memory.bandwidth.value,
            "units": [unit.kind for unit in device.units],
            "targets": [target.name for target in device.targets],
        }
        for device in profiles
    ]


def devices_text(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of `device_rows` as a table. Memory is in GiB, as it is sold, bandwidth in GB/s (powers of ten)."""
    found = table(
        "device", "kind", "chip", "memory", "bandwidth", "units", "targets", left=("kind", "chip", "units", "targets")
    )
    for row in rows:
        found.add_row(
            row["name"],
            row["kind"],
            f"another name of {row['alias_of']}" if row["alias_of"] else row["chip"] or "",
            "" if row["memory"] is None else f"{row['memory'] / 2**30:.4g} GiB",
            "" if row["bandwidth"] is None else f"{row['bandwidth'] / 1e9:.4g} GB/s",
            " ".join(row["units"]),
            " ".join(row["targets"]),
        )
    return text(found)


def device_text(device: DeviceProfile) -> str:
    """The profile as TOML; a first line says of what it is another name."""
    alias = f"# another name of {device.alias_of}, whose profile has the numbers\n" if device.alias_of else ""
    return alias + to_toml(device).rstrip("\n")

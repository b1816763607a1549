"""`doctor --device URL`: what a device is, what a measurement lacks there, and how to get it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from ..errors import UserError
from ..measuring.device import About, Device
from ..measuring.links import Link, LinkDown, open_link
from ..system.reading import one_line
from ..targets.onnx.releases import OLDEST

_SHELL = (
    "uname -sm; getprop ro.product.model 2>/dev/null; getprop ro.soc.model 2>/dev/null; "
    "getprop ro.build.version.release 2>/dev/null; grep -E '^Mem(Total|Available)' /proc/meminfo; df -k . | tail -n 1"
)


def doctor_device(url: str, python: str, note: Callable[[str], None]) -> dict[str, Any]:
    """Of a device. Raises UserError where it cannot be reached. "missing": what lacks -> how to get it."""
    link = open_link(url)
    device = Device(link, python, note)
    try:
        about = device.connect()
    except UserError as error:
        told = _by_shell(link)
        if not told:
            raise
        return {"device": url, "shell": told, "missing": {"python": str(error).removeprefix(f"{url}: ")}}
    return {"device": url, "about": about.model_dump(mode="json"), "missing": _missing(about)}


def doctor_device_text(found: dict[str, Any]) -> str:
    lines = [f"device      {found['device']}"]
    if "shell" in found:
        lines += [f"it says     {line}" for line in found["shell"]]
    else:
        lines += _lines(About.model_validate(found["about"]))
    lines += [f"missing     {name}: {way}" for name, way in found["missing"].items()]
    if not found["missing"]:
        lines.append(f"ready       edgewright profile BUNDLE --device {found['device']}")
    return "\n".join(lines)


def _missing(about: About) -> dict[str, str]:
    missing = {}
    if about.onnxruntime is None or about.numpy is None:
        lacks = " and ".join(n for n, v in (("onnxruntime", about.onnxruntime), ("numpy", about.numpy)) if v is None)
        wheels = about.libc[:1] == ("glibc",)
        missing[lacks] = (
            f"`profile` sends wheels for {about.machine}, Python {about.python}, glibc {about.libc[1]}"
            if wheels
            else f"there are no wheels for {about.machine} and its C library; install them from the device's packages"
        )
    if about.onnxruntime is not None and not about.runs(OLDEST) and about.numpy is not None:
        missing["onnxruntime"] = (
            f"{about.onnxruntime} there opens no graph of an export; `profile` sends {OLDEST} or later"
        )
    return missing


def _lines(about: About) -> list[str]:
    def sized(count: int | None) -> str:
        return "unknown" if count is None else f"{count / 1e9:.1f} GB"

    clocks = about.clocks
    shown = "not measured"
    if isinstance(clocks, tuple):
        shown = "; ".join(
            f"cores {c.cores}: {c.mhz or 0:.0f} of {c.most_mhz or 0:.0f} MHz ({c.governor or 'no governor'})"
            for c in clocks
        )
    celsius = about.celsius
    heat = "not measured"
    if isinstance(celsius, dict):
        heat = ", ".join(f"{name} {value:.0f} °C" for name, value in sorted(celsius.items(), key=lambda i: -i[1])[:4])
    energy = about.energy if isinstance(about.energy, str) else ", ".join(about.energy)
    return [
        f"machine     {about.machine}{' (emulated: no times are told)' if about.emulated else ''}, {about.board or 'unnamed'}",
        f"system      {about.system}, {' '.join(about.libc) or 'an unknown C library'}",
        f"cpu         {about.cpu}, {about.cores} cores",
        f"python      {about.python}, onnxruntime {about.onnxruntime or 'missing'}, numpy {about.numpy or 'missing'}",
        f"memory      {sized(about.memory_free_bytes)} free of {sized(about.memory_bytes)}",
        f"disk        {sized(about.disk_free_bytes)} free",
        f"clocks      {shown}",
        f"heat        {heat}; throttling: {about.throttling}",
        f"energy      {energy}",
    ]


def _by_shell(link: Link) -> list[str]:
    """What a device without Python says of itself; [] where it cannot be reached."""
    try:
        done = link.run(["sh", "-c", _SHELL], 30.0)
    except (LinkDown, UserError):
        return []
    return [re.sub(r"\s+", " ", one_line(line, 120)) for line in done.out.splitlines() if line.strip()][:12]

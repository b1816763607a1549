"""What `embed` prints of the project that it made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .embed import Project

_NEXT = {
    "android": "open OUTPUT in Android Studio, or: cd OUTPUT && gradle :app:installDebug",
    "react-native": "read OUTPUT/README.md: it goes into an app of yours",
    "web": "edgewright preview OUTPUT",
    "cpp": "cmake -B build -DONNXRUNTIME=DIR && cmake --build build && ctest --test-dir build",
    "swift": "swift build and edgewright-app --trace model/traces.json, as README.md says; the sample for Xcode is in App/",
}


def project_json(project: Project, output: Path, platform: str) -> dict[str, Any]:
    return {
        "platform": platform,
        "folder": str(output),
        "files": sorted(project.files),
        "bytes": project.size,
        "memory_bytes": project.app.memory.total,
        "onnxruntime": project.app.oldest_runtime,
    }


def project_text(project: Project, output: Path, platform: str) -> str:
    app = project.app
    return (
        f"{output}: {len(project.files)} files, {project.size / 1e6:.1f} MB; about {app.memory.total / 1e6:.0f} MB of memory; "
        f"ONNX Runtime {app.oldest_runtime} or later\nnext: {_NEXT[platform].replace('OUTPUT', str(output))}"
    )

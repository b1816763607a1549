"""Sessions on onnxruntime-qnn's HTP backend, compiling or running. A leaf: ONNX Runtime enters, never torch.

On Qualcomm hardware the backend is the NPU, on x86 the vendor's emulator of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .session import Placement

NAME = "QNNExecutionProvider"


def session(path: Path, options: Mapping[str, str], config: Mapping[str, str], threads: int = 0) -> Any:
    """An onnxruntime session over `path`, the QNN provider first, the CPU for what it leaves.

    options: the provider's own; config: session entries. Raises what onnxruntime raises, ImportError without the package.
    """
    import onnxruntime as ort
    import onnxruntime_qnn

    if not any(d.ep_name == NAME for d in ort.get_ep_devices()):
        ort.register_execution_provider_library(NAME, onnxruntime_qnn.get_library_path())
    devices = [d for d in ort.get_ep_devices() if d.ep_name == NAME]
    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    settings.intra_op_num_threads = threads
    settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    for key, value in config.items():
        settings.add_session_config_entry(key, value)
    settings.add_provider_for_devices(devices, {"backend_path": onnxruntime_qnn.get_qnn_htp_path(), **options})
    return ort.InferenceSession(str(path), settings)


def placement(sessions: Mapping[str, Any]) -> Placement:
    """Program -> provider -> op -> nodes, as the runtime itself assigned them."""
    found: Placement = {}
    for name, loaded in sessions.items():
        counts: dict[str, Counter[str]] = {}
        for part in loaded.get_provider_graph_assignment_info():
            counts.setdefault(part.ep_name, Counter()).update(n.op_type for n in part.get_nodes())
        found[name] = {provider: dict(ops) for provider, ops in counts.items()}
    return found

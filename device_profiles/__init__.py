"""Devices: one TOML each, their loader, and measuring the host.

`profile` holds the type and the loader, `measure` the measuring, `*.toml` the library. What may enter: `errors`,
`untrusted`, numpy, onnx and onnxruntime; no torch, so that `edgewright devices` starts fast.
"""

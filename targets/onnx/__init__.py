"""Facts of ONNX Runtime."""

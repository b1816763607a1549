"""Facts of TensorRT."""

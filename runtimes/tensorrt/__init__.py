"""TensorRT engines on a GPU, their network elsewhere."""

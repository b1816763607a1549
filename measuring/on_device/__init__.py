"""What runs on the device: the standard library, numpy and onnxruntime alone, Python 3.9 on. It travels as one file."""

"""Facts of Qualcomm's NPU."""

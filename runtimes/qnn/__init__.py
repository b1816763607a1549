"""Qualcomm's NPU, or its emulator."""

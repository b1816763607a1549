"""Calibration data, and the passes over a model that measure it layer by layer."""

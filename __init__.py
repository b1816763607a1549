"""Edgewright: an on-device deployment compiler for small language models."""

__version__ = "0.1.0"

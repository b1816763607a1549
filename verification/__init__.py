"""Artefacts compared with their reference, and quantized models with their originals."""

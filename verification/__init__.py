"""Artefacts held against their reference, and models against their originals."""

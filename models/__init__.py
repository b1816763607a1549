"""Architectures, and what builds and loads them."""

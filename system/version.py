"""The version of Edgewright, as in pyproject.toml."""

__version__ = "0.1.0"

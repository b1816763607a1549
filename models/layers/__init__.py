"""The layers that architectures share."""

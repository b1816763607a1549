"""Facts of Core ML."""

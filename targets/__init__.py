"""The facts of each target, and the readers of its files."""

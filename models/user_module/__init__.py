"""A user's own module."""

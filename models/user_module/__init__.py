"""A user's own module in place of a checkpoint."""

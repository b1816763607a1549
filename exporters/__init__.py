"""One package a target, each a table of lowerings."""

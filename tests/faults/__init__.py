"""Exports and runs that are killed, starved, raced and repeated; `python -m faults` does it for as long as one likes."""

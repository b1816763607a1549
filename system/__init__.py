"""The machine: memory, processes, files under way."""

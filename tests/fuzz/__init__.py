"""Mutants of every file that a stranger may hand over, thousands of them; `make fuzz` runs it for as long as one likes."""

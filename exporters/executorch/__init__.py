"""Graphs as an ExecuTorch program."""

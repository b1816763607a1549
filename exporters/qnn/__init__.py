"""Graphs as Qualcomm context binaries."""

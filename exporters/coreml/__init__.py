"""Graphs as a Core ML package."""

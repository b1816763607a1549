"""Arm's Ethos-U through the TOSA reference model."""

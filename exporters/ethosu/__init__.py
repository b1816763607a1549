"""Encoders as Ethos-U programs."""

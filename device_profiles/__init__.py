"""Devices: one TOML each, their loader, and measuring the host."""

"""Devices: one TOML file each, the type and loader of a profile, and the measuring of the host. No torch is imported."""

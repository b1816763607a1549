"""Checkpoints that were quantized before: each scheme's parts seen as the float32 weights that they mean.

`opening` reads the block of config.json that names the scheme, before any tensor. One file a scheme.
"""

"""The stages of `compiler.export`, one file each."""

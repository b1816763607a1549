"""Facts of ExecuTorch."""

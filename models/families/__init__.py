"""One file for each architecture; what several families share is in `gemma` and `gated_delta`."""

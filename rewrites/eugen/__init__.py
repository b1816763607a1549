"""Feed-forward blocks turned into EUGens (arXiv 2601.22563)."""

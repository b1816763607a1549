"""Facts of Arm's Ethos-U."""

"""What each command does besides parsing."""

"""The layers that families share."""

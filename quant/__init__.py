"""Codes and scales, the plan and its allocation, the streaming quantizer."""

"""Codes and scales, importance, allocation, the plan, the streaming quantizer. What may enter: `models`, `ops`."""

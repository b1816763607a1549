"""Codes and scales, importance, allocation, the plan and the streaming quantizer. What may enter: `models`, `device_profiles`."""

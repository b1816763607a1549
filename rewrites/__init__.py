"""Model-to-model changes: a checkpoint directory in, a checkpoint directory out. What may enter: `models`, `ops`, the readers.

Calibration runs the model eagerly, so `runtimes.eager` and `runtimes.generate` enter here as they do in `scoring`.
"""

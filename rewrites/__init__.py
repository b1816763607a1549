"""Model-to-model changes: a checkpoint directory in, a checkpoint directory out."""

"""Core ML: the runtime on a Mac, a numpy evaluator elsewhere."""

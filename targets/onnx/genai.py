"""The graph that onnxruntime-genai runs: its name, and that of the input which it has besides tokens and caches."""

NAME = "genai"
MASK = "attention_mask"

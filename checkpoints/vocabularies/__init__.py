"""Vocabularies in other files than tokenizer.json, each made into what tokenizer.json would hold."""

"""Engines: transformers in process, an OpenAI-compatible server, and training a teacher from gold data."""

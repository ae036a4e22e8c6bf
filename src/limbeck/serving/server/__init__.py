"""The OpenAI-compatible server on the engine."""

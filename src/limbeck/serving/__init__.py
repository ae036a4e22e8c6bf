"""Models in GGUF that run on the CPU: the engine, its tokenizer, sampling, speculative decoding."""

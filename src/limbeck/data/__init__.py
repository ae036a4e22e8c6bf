"""Text to packed rows of tokens: sources, tokenizer, packing to Parquet, and reading the rows back."""

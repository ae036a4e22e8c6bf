"""Scores of a student on held-out rows: perplexity, bits per byte, and fidelity to the teacher."""

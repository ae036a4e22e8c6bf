"""Decoders whose routed experts take fewer weights: shared cores, latent spaces, fewer experts."""

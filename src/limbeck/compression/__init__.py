"""Compressing teachers: experts in fewer weights, fewer experts, fewer layers, narrower feed-forward layers."""

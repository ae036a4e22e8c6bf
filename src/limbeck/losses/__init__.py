"""Losses on sparse targets: divergences on a partition, and the fused linear + loss."""

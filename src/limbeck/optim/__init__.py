"""Optimizers of a run: an algorithm per group of parameters, learning-rate schedules, ramps of the loss."""

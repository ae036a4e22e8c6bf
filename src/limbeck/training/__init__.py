"""Training: transformers.Trainer with teacher targets, whole checkpoints and log lines."""

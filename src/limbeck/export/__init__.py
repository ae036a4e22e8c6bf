"""Finished students in the formats that other programs read."""

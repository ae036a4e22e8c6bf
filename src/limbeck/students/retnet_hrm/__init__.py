"""RetNet-HRM: a causal LM without attention, whose layers may be applied in cycles. See `modeling.py`."""

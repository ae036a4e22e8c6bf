"""Student models: building them, and making chosen weights ternary."""

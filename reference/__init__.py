"""Defines every operation in NumPy, in float64, forward pass and gradient side by side. Start with `reference/README.md`."""

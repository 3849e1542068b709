"""What every operation means: NumPy alone, float64, forward and gradient side by side. Start with `reference/README.md`."""

"""Measures the fast path beside plain PyTorch: `python bench/run.py`."""

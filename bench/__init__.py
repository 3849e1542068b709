"""How quick the fast path is, beside what PyTorch gives anyone: `python bench/run.py`."""

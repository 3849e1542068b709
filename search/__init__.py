"""Finds cells and tests them; every stage is a command: `python -m search.random --help`."""

"""`python -m search.datasets check`: see check.py, which the processes it starts can import, unlike a `__main__`."""

from search.cli import run_command
from search.datasets.check import CheckSettings, main

if __name__ == "__main__":
    run_command(CheckSettings, main, prog="python -m search.datasets")

"""Finds cells and tests them; every stage is a command: `python -m search.random --help`."""

import sys

if sys.argv[:1] == ["-m"]:  # a command is about to run: so Python calls itself while it looks for one
    from search.commands import explain_missing_packages

    explain_missing_packages()

"""How a cell is found and proven; each stage is a module that runs: `python -m search.random --help`."""

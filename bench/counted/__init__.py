"""What an iteration should take on a GPU that is not here: every launch counted in the code that Triton compiles for it.

    python -m bench.counted           # write bench/predictions/ anew
    python -m bench.counted --check   # compare with it

    iteration.py   every launch of an iteration in order, with its arguments
    sass.py        the instructions that a launch executes: straight code once, loops by their trips (trips.py)
    model.py       microseconds on an H200, from these counts and guessed rates
    table.py       a line for each launch, as CSV; bench/predictions/README.md says how to read it

Counts come from the compiler, so they change with its version; times are a model that no GPU has met yet.
"""

"""A run on disk, the loop of a search, and the workers that evaluate its cells."""

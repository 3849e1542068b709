"""What can be found: the search space, how it is sampled, what a cell costs and what it sees."""

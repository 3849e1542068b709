"""The search space, its samplers, the cost of a cell and its receptive field."""

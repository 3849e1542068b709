"""How a whole network is trained: crops, optimiser, loop, what is kept on disk, scores."""

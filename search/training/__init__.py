"""Training of whole networks: crops, optimiser, loop, files, scores."""

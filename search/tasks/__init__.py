"""How one cell is scored: by a short training on cached features (the proxy), or end to end in a whole network."""

"""What a cell is worth: briefly trained on cached features (the proxy), or in a whole network, end to end."""

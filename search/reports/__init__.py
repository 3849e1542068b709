"""Reports: pages, diagrams, scatter plots, rank correlations and latencies."""

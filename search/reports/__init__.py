"""What people read: pages, diagrams, scatters, rank correlations and latencies."""

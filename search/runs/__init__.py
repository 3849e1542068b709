"""What lasts while a search runs, and who evaluates its cells."""

"""What ``align_models`` compares: two modules that somebody has in memory, and which part is which."""

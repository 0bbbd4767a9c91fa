"""What the README claims in figures, measured by commands that anyone can run."""

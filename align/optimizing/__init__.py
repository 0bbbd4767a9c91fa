"""What ``align.optimizer`` compares: one recipe built on both sides, and the updates that it makes."""

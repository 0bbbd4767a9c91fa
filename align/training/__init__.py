"""What ``align.train`` compares: a fine-tuning of both sides, its lessons, masks, checkpoints and curves."""

"""What ``align.backward`` compares: gradients of both sides, also of a model larger than memory."""

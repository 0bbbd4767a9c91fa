"""Run the torch model and the Paddle model on the same inputs, stage by stage, and say whether they are the same."""

"""Read a torch checkpoint, move every tensor by a family's rules, and prove the Paddle checkpoint bit-exact."""

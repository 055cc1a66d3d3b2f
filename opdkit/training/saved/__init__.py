"""What a run writes and goes on from, and the model it gives away."""

"""What a model acts in: environments of many turns, and the processes that hold them."""

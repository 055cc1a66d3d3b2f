"""What token ids mean: bytes, stops, and which ids two models share."""

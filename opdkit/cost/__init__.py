"""What a run will cost: bytes and seconds of a step, from the recipe and the models' configs. Nothing is loaded."""

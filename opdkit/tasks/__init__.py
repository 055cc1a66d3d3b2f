"""Problems and graders. No torch here: a saved run is re-graded on a laptop."""

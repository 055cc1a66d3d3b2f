"""Which problems a run takes, and in which order."""

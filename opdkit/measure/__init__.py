"""Numbers from saved rows. No torch here: a table is recomputed on a laptop."""

"""Dataset files and hub names in, `Problem`s out. No torch here."""

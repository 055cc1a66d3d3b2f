"""What the teacher reads: text and ids. No torch here."""

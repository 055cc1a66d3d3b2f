"""How the Hugging Face engine samples."""

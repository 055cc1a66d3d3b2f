"""Files that a vLLM process reads; this folder is put on its PYTHONPATH."""

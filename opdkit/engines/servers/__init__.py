"""Models that another process serves: vLLM, started by opdkit or by somebody else, and SGLang."""

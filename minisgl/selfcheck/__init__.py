"""`python -m minisgl selfcheck`: every layer of the engine against transformers."""

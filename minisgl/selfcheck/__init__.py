"""`python -m minisgl selfcheck` compares every layer of the engine with transformers."""

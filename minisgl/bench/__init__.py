"""Measures what each optimisation of the engine buys: `python -m minisgl bench`."""

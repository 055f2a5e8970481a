"""The commands of `python -m minisgl`, one file each, and their flags."""

"""Models: resolving, loading, tokenizing and running them.  Only some modules here import torch (see docs/structures.md)."""

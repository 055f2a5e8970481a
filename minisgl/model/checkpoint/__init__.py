"""Checkpoints: from --model to a ModelSpec, and from files to a rank's weights."""

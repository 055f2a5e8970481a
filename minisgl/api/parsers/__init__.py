"""Readers of a model's text as it grows: thoughts, tool calls, JSON."""

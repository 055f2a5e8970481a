"""Paged attention on a GPU: one interface, three backends, and the choice between them."""

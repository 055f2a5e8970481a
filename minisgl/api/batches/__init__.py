"""Batches: files of requests that the server works off by itself, and the batch socket."""

"""Serves batches: files of requests that the server answers in the background, and the batch socket."""

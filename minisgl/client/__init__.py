"""The client of the batch socket."""

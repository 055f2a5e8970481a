"""The scheduler: continuous batching, chunked prefill and overlap scheduling as one pure step machine, and its actor."""

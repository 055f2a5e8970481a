"""What routers are told of the prefix cache: which blocks it holds, as KV events over ZMQ."""

"""What CPU and GPU workers share: interfaces, slots, grammars, positions, shards."""

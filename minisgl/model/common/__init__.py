"""Code that CPU and GPU workers share: interfaces, slots, grammars, rotary positions, shards."""

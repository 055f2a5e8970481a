"""Page allocator and radix tree: numpy and the standard library, used by the scheduler process only."""

"""Page allocator and radix prefix tree: numpy and the standard library, used by the scheduler process only."""

"""The CPU's own kernels: quantised products and paged attention in C, and their counterparts in torch."""

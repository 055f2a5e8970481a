"""The worker on a CPU: runner, layers, attention, sampler; C kernels for quantised products and attention."""

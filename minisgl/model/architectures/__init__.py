"""One file an architecture; minisgl.model.common.registry knows them by name."""

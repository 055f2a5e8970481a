"""Model architectures, one file each, under names that minisgl.model.common.registry lists."""

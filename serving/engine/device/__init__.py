"""Rounds on a device: whole steps as programs over fixed buffers, begun before the last one has landed."""

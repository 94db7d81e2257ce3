"""The unit of every size that is shown."""

GIB = 1 << 30
"""Bytes of a GiB."""

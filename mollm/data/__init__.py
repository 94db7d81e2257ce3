"""Data: files, records, chat format, encoded rows, samplers."""

from mollm.data.records import Record, load_records

__all__ = ["Record", "load_records"]

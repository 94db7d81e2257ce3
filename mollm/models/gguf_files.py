"""GGUF files: their header is read once, where every question about a model would read it anew."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from threading import RLock
from typing import Any

_lock = RLock()
_inside = False


@contextmanager
def headers_read_once() -> Iterator[None]:
    """Inside, whoever asks gguf for the same file again gets the reader that is there.

    transformers opens a file for its configuration, its tokenizer and its weights, a header with a
    vocabulary takes it seconds, and it makes the table of tensor names for every module.
    """
    global _inside
    with _lock:
        if _inside or find_spec("gguf") is None:  # whoever reads such a file says what to install
            yield
            return
        import gguf

        before = gguf.GGUFReader, gguf.get_tensor_name_map
        gguf.GGUFReader, gguf.get_tensor_name_map = _kept(before[0]), cache(before[1])
        _inside = True
        try:
            yield
        finally:
            gguf.GGUFReader, gguf.get_tensor_name_map = before
            _inside = False


def _kept(reader: Any) -> Any:
    import numpy as np

    class Reader(reader):  # type: ignore[misc]  # gguf has no types
        """Slices of a plain array, which is faster than of a memory map."""

        @property
        def data(self) -> Any:
            return self._data

        @data.setter
        def data(self, mapped: Any) -> None:
            self._data = np.asarray(mapped)

    @cache
    def opened(path: str, changed: int, size: int) -> Any:
        return Reader(path)

    def of(path: Any, *options: Any, **named: Any) -> Any:
        if options or named:
            return reader(path, *options, **named)
        found = os.stat(path)
        return opened(os.fspath(path), found.st_mtime_ns, found.st_size)

    return of

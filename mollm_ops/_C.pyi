from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

HAS_CUDA: bool
MAX_OBJECTIVES: int
CUDA_CHUNK: int

def cpu_instruction_set() -> str: ...

# Every argument is checked before it is used: ValueError where counts, lengths, codes or null
# addresses do not fit together. That an address has the memory it stands for is up to the caller.

_List = tuple[Sequence[int], Sequence[int]]  # addresses, dtypes
_Memory = tuple[int, int]  # address, elements

def gram_cpu(
    data: Sequence[int],
    dtypes: Sequence[int],
    counts: Sequence[int],
    means: tuple[_List, float] | None,
    metric: tuple[_List, Sequence[float], Sequence[float], float, float] | None,
    gram: _Memory,
    threads: int,
) -> None: ...
def update_cpu(
    data: Sequence[int],
    dtypes: Sequence[int],
    counts: Sequence[int],
    weights: Sequence[float],
    second_weights: Sequence[float] | None,
    means: tuple[_List, float] | None,
    params: _List,
    first: _List | None,
    second: _List | None,
    steps: Sequence[int],
    options: Mapping[str, object],
    changes: _Memory | None,
    threads: int,
) -> None: ...
def combine_cpu(
    data: Sequence[int],
    dtypes: Sequence[int],
    counts: Sequence[int],
    weights: _Memory,
    out: _List,
    threads: int,
) -> None: ...
def dots_cpu(
    data: Sequence[int],
    dtypes: Sequence[int],
    counts: Sequence[int],
    x: _List,
    dots: _Memory,
    threads: int,
) -> None: ...
def cuda_grid(lists: int) -> int: ...
def cuda_moved_grid(lists: int, means: bool) -> int: ...
def gram_cuda(
    table: _Memory,
    lists: int,
    tensors: int,
    chunks: int,
    partials: _Memory,
    arrived: _Memory,
    blocks: int,
    gram: _Memory,
    stream: int,
) -> None: ...
def gram_moved_cuda(
    table: _Memory,
    lists: int,
    tensors: int,
    chunks: int,
    means: _Memory | None,
    beta: float,
    moments: _Memory | None,
    second_weights: _Memory | None,
    beta2: float,
    eps: float,
    partials: _Memory,
    arrived: _Memory,
    blocks: int,
    gram: _Memory,
    stream: int,
) -> None: ...
def update_cuda(
    table: _Memory,
    lists: int,
    tensors: int,
    chunks: int,
    targets: _Memory,
    weights: _Memory,
    second_weights: _Memory | None,
    means: _Memory | None,
    beta: float,
    proceed: _Memory | None,
    lr: _Memory | None,
    options: Mapping[str, object],
    partials: _Memory,
    arrived: _Memory,
    blocks: int,
    changes: _Memory | None,
    stream: int,
) -> None: ...
def combine_cuda(
    table: _Memory,
    lists: int,
    tensors: int,
    chunks: int,
    weights: _Memory,
    out_table: _Memory,
    blocks: int,
    stream: int,
) -> None: ...
def solve_cuda(
    gram: _Memory,
    objectives: int,
    rule: int,
    preferences: _Memory,
    normalize: bool,
    length: int,
    packed: _Memory,
    stream: int,
) -> None: ...
def dual_space_solution(
    gram: NDArray[np.float64], length: int
) -> tuple[NDArray[np.float64], int, float]: ...
def min_norm_solution(
    gram: NDArray[np.float64], normalize: bool, length: int
) -> tuple[NDArray[np.float64], int, float]: ...
def projected_solution(
    gram: NDArray[np.float64],
    preferences: Sequence[float],
    each_alone: bool,
    normalize: bool,
    length: int,
) -> tuple[NDArray[np.float64], int, float]: ...
def rows_cpu(
    rows: int,
    vocab: int,
    dtype: int,
    gradient_dtype: int,
    logits: int,
    stride: int,
    reference: int,
    reference_stride: int,
    target: int,
    eps: float,
    ce: tuple[int, int, int, int, int] | None,
    kl: tuple[int, int, int, int, int] | None,
    map: tuple[float, float],
    reference_map: tuple[float, float],
    threads: int,
) -> None: ...

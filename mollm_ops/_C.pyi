from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

HAS_CUDA: bool
MAX_OBJECTIVES: int
CUDA_CHUNK: int

def cpu_instruction_set() -> str: ...

_List = tuple[Sequence[int], Sequence[int]]  # addresses, dtypes

def gram_cpu(
    data: Sequence[int],
    dtypes: Sequence[int],
    counts: Sequence[int],
    means: tuple[_List, float] | None,
    metric: tuple[_List, Sequence[float], Sequence[float], float, float] | None,
    gram: int,
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
    changes: int,
    threads: int,
) -> None: ...
def combine_cpu(
    data: Sequence[int],
    dtypes: Sequence[int],
    counts: Sequence[int],
    weights: int,
    out: Sequence[int],
    out_dtypes: Sequence[int],
    threads: int,
) -> None: ...
def dots_cpu(
    data: Sequence[int],
    dtypes: Sequence[int],
    counts: Sequence[int],
    x: Sequence[int],
    x_dtypes: Sequence[int],
    dots: int,
    threads: int,
) -> None: ...
def cuda_grid(lists: int) -> int: ...
def gram_cuda(
    table: int,
    lists: int,
    tensors: int,
    chunks: int,
    partials: int,
    arrived: int,
    blocks: int,
    gram: int,
    stream: int,
) -> None: ...
def gram_moved_cuda(
    table: int,
    lists: int,
    tensors: int,
    chunks: int,
    means: int,
    beta: float,
    moments: int,
    second_weights: int,
    beta2: float,
    eps: float,
    partials: int,
    arrived: int,
    blocks: int,
    gram: int,
    stream: int,
) -> None: ...
def update_cuda(
    table: int,
    lists: int,
    tensors: int,
    chunks: int,
    targets: int,
    weights: int,
    second_weights: int,
    means: int,
    beta: float,
    proceed: int,
    lr: int,
    options: Mapping[str, object],
    partials: int,
    arrived: int,
    blocks: int,
    changes: int,
    stream: int,
) -> None: ...
def combine_cuda(
    table: int,
    lists: int,
    tensors: int,
    chunks: int,
    weights: int,
    out_table: int,
    blocks: int,
    stream: int,
) -> None: ...
def solve_cuda(
    gram: int,
    objectives: int,
    rule: int,
    preferences: int,
    normalize: bool,
    length: int,
    packed: int,
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
    threads: int,
) -> None: ...

"""Small programs with tensor factories and per-rank numbers, in groups that compile together.

A program gets n (the rows of this rank's input), r (its rank) and x (its input, n x 4). It is run
by plain torch once per rank, and in a world where n and r are per-rank numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from localtensor_compile import LocalIntNode, LocalTensor

Program = Callable[[Any, Any, Tensor], Tensor]

WORLD = 3
ROWS = {rank: 2 + rank for rank in range(WORLD)}
RANK_NUMBER = torch.SymInt(LocalIntNode({rank: rank for rank in range(WORLD)}))
PLAIN = torch.arange(16.0).reshape(4, 4)
ARRAY = np.arange(3)


def inputs() -> dict[int, Tensor]:
    return {r: torch.arange(4.0 * n).reshape(n, 4) + r for r, n in ROWS.items()}


def written(x: Tensor, index: Any, value: Any) -> Tensor:
    result = x.clone()
    result[index] = value
    return result


GROUPS: dict[str, dict[str, Program]] = {
    "sizes": {
        "zeros": lambda n, r, x: torch.zeros(n, 4),
        "zeros_tuple": lambda n, r, x: torch.zeros((2, n), dtype=torch.int32),
        "zeros_by_name": lambda n, r, x: torch.zeros(size=(n,)),
        "zeros_complex": lambda n, r, x: torch.zeros(n, dtype=torch.complex64),
        "zeros_of_shape": lambda n, r, x: torch.zeros(x.shape),
        "ones": lambda n, r, x: torch.ones(n),
        "empty": lambda n, r, x: torch.empty(n, 3, dtype=torch.float64).fill_(7),
        "full": lambda n, r, x: torch.full((2, n), 3.5),
        "eye": lambda n, r, x: torch.eye(n),
        "eye_wide": lambda n, r, x: torch.eye(n, 3),
        "empty_strided": lambda n, r, x: torch.empty_strided((n, 2), (1, n)).fill_(2),
        "empty_permuted": lambda n, r, x: torch.empty_permuted((n, 2, 3), (2, 0, 1)).fill_(2),
        "tril_indices": lambda n, r, x: torch.tril_indices(n, 3),
        "triu_indices": lambda n, r, x: torch.triu_indices(n, 3, 1),
    },
    "ranges": {
        "arange": lambda n, r, x: torch.arange(n),
        "arange_bounds": lambda n, r, x: torch.arange(r, n * 2, 2),
        "arange_float": lambda n, r, x: torch.arange(0, 2, 0.25),
        "arange_float_per_rank": lambda n, r, x: torch.arange(0.0, r + 1, 0.5),
        "linspace": lambda n, r, x: torch.linspace(0, 1, n),
        "linspace_bounds": lambda n, r, x: torch.linspace(r, r + 1, 5),
        "logspace": lambda n, r, x: torch.logspace(0, 1, n),
        "fftfreq": lambda n, r, x: torch.fft.fftfreq(n),
        "rfftfreq": lambda n, r, x: torch.fft.rfftfreq(n),
    },
    "windows": {
        "hann_window": lambda n, r, x: torch.hann_window(n),
        "hamming_window": lambda n, r, x: torch.hamming_window(n),
        "blackman_window": lambda n, r, x: torch.blackman_window(n),
        "bartlett_window": lambda n, r, x: torch.bartlett_window(n),
        "kaiser_window": lambda n, r, x: torch.kaiser_window(n),
        "signal_cosine": lambda n, r, x: torch.signal.windows.cosine(4),
        "signal_gaussian": lambda n, r, x: torch.signal.windows.gaussian(n),
    },
    "values": {
        "full_rank": lambda n, r, x: torch.full((3,), r),
        "full_rank_float": lambda n, r, x: torch.full((3,), r * 0.5),
        "tensor": lambda n, r, x: torch.tensor([[1.0, 2.0], [3, 4]]),
        "tensor_number": lambda n, r, x: torch.tensor(3),
        "tensor_rank": lambda n, r, x: torch.tensor(r),
        "tensor_ranks": lambda n, r, x: torch.tensor([r, n, 1]),
        "tensor_nested": lambda n, r, x: torch.tensor([[r, 1.5], [2, n]]),
        "tensor_dtype": lambda n, r, x: torch.tensor([r, 2], dtype=torch.float64),
        "tensor_array": lambda n, r, x: torch.tensor(ARRAY),
        "as_tensor": lambda n, r, x: torch.as_tensor([1, 2]),
        "as_tensor_rank": lambda n, r, x: torch.as_tensor([r, 2]),
        "as_tensor_array": lambda n, r, x: torch.as_tensor(ARRAY),
        "asarray": lambda n, r, x: torch.asarray([1.0, 2.0]),
        "asarray_array": lambda n, r, x: torch.asarray(ARRAY),
        "scalar_tensor": lambda n, r, x: torch.scalar_tensor(r),
        "scalar_tensor_dtype": lambda n, r, x: torch.scalar_tensor(2.5, dtype=torch.float64),
        "complex": lambda n, r, x: torch.complex(torch.ones(n), torch.zeros(n)),
        "polar": lambda n, r, x: torch.polar(torch.ones(n), torch.zeros(n)),
    },
    "like": {
        "zeros_like": lambda n, r, x: torch.zeros_like(x),
        "full_like": lambda n, r, x: torch.full_like(x, 2.0),
        "new_zeros": lambda n, r, x: x.new_zeros(n + 1),
        "new_full": lambda n, r, x: x.new_full((n,), 2.0),
        "new_tensor": lambda n, r, x: x.new_tensor([1, 2]),
        "new_tensor_rank": lambda n, r, x: x.new_tensor([r, 2]),
        "mask": lambda n, r, x: x + torch.ones(n, n).tril() @ x,
        "in_place": lambda n, r, x: torch.zeros(n, 4).add_(x).mul_(r),
        "out": lambda n, r, x: torch.zeros(n, 4, out=torch.empty(n, 4)),
        "mixed_with_plain": lambda n, r, x: PLAIN[0] + x * torch.ones(4),
    },
    "indexes": {
        "row": lambda n, r, x: x[r],
        "column": lambda n, r, x: x[:, r],
        "element": lambda n, r, x: x[r, 1],
        "last": lambda n, r, x: x[..., r],
        "new_dim": lambda n, r, x: x[None, r, 1:3],
        "both": lambda n, r, x: x[r, r],
        "int_first": lambda n, r, x: x[0, r],
        "slice": lambda n, r, x: x[r : r + 1],
        "slice_columns": lambda n, r, x: x[:, r:],
        "slice_block": lambda n, r, x: torch.arange(16.0)[r * 4 : (r + 1) * 4],
        "list": lambda n, r, x: x[[r, 0]],
        "tensor": lambda n, r, x: x[torch.tensor([r, 1]), r],
        "set_row": lambda n, r, x: written(x, r, 5.0),
        "set_slice": lambda n, r, x: written(x, slice(0, r), 5.0),
        "set_element": lambda n, r, x: written(x, (r, slice(1, None)), torch.ones(3)),
        "set_number": lambda n, r, x: written(x, r, n),
    },
    "splits": {
        "split": lambda n, r, x: x.split([r, n - r])[1] * 2,
        "split_dim": lambda n, r, x: torch.split(x, [r + 1, 3 - r], dim=1)[0] * 2,
        "split_by_name": lambda n, r, x: x.split(split_size=[1, n - 1], dim=-2)[1],
        "split_with_sizes": lambda n, r, x: x.split_with_sizes([1, n - 1])[1],
        "narrow": lambda n, r, x: x.narrow(0, r, 1),
        "pad": lambda n, r, x: F.pad(x, (0, r)),
        "roll": lambda n, r, x: x.roll(r, 0),
    },
    "plain": {
        "mul": lambda n, r, x: PLAIN * r,
        "reversed": lambda n, r, x: 2 - r * PLAIN,
        "true_divide": lambda n, r, x: PLAIN / n,
        "compare": lambda n, r, x: PLAIN > r,
        "row": lambda n, r, x: PLAIN[r],
        "slice": lambda n, r, x: PLAIN[r : r + 2],
        "split": lambda n, r, x: PLAIN.split([r, 4 - r])[1],
        "new_zeros": lambda n, r, x: PLAIN.new_zeros(n),
        "new_tensor": lambda n, r, x: PLAIN.new_tensor([r, 1]),
        "expand": lambda n, r, x: PLAIN[:1].expand(n, 4),
        "narrow": lambda n, r, x: PLAIN.narrow(0, r, 1),
        "pad": lambda n, r, x: F.pad(PLAIN, (0, r)),
    },
}


def expected(program: Program) -> dict[int, Tensor]:
    """What plain torch computes on each rank."""
    return {r: program(ROWS[r], r, x) for r, x in inputs().items()}


def require_same(result: object, wanted: dict[int, Tensor], name: str) -> None:
    """Bit-equal on every rank, with the same dtype, device, strides and requires_grad."""
    assert type(result) is LocalTensor, f"{name} gave {type(result).__name__}"
    shards = result._local_tensors
    assert list(shards) == list(wanted)
    for r, want in wanted.items():
        got = shards[r]
        assert type(got) is Tensor, name
        assert (got.dtype, got.device, got.shape) == (want.dtype, want.device, want.shape), name
        assert got.stride() == want.stride(), f"{name}: strides {got.stride()}, {want.stride()}"
        assert torch.equal(got, want), f"{name}, rank {r}: {got} is not {want}"
        assert result.requires_grad == want.requires_grad, name

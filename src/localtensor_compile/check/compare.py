"""How two tensors differ: pure functions on plain CPU tensors, no engines and no ranks.

Equality of bits is the normal case; everything else measured here explains a difference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Same values as torch.testing.assert_close uses; other dtypes must be equal.
_TOLERANCES: dict[torch.dtype, tuple[float, float]] = {
    torch.float16: (1e-3, 1e-5),
    torch.bfloat16: (1.6e-2, 1e-5),
    torch.float32: (1.3e-6, 1e-5),
    torch.float64: (1e-7, 1e-7),
    torch.complex32: (1e-3, 1e-5),
    torch.complex64: (1.3e-6, 1e-5),
    torch.complex128: (1e-7, 1e-7),
}

_BITS_OF_FLOAT = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
_HAS_ULP = frozenset({*_BITS_OF_FLOAT, torch.complex64, torch.complex128})


def tolerances(dtype: torch.dtype) -> tuple[float, float]:
    """(rtol, atol) that torch.testing.assert_close uses for `dtype`; zeros where it has none."""
    return _TOLERANCES.get(dtype, (0.0, 0.0))


@dataclass(frozen=True)
class Comparison:
    """What `compare` found. `kind` is one of

    - "bit-equal": same dtype, shape and values; NaN equals NaN, and -0.0 equals 0.0 but is counted
      in `signed_zeros`;
    - "differs": same dtype and shape, some values differ;
    - "shape" or "dtype": not comparable value by value, nothing below is measured.

    Where values were compared:

    - `mismatches`: number of positions that differ, of `numel`;
    - `beyond`: of these, how many differ by more than atol + rtol * |expected|;
    - `max_abs`: largest |actual - expected|, inf where only one of them is NaN;
    - `max_rel`: largest |actual - expected| / |expected|, inf where expected is 0 or one is NaN;
    - `max_ulp`: largest `ulp_distance`, None for dtypes without one and where one is NaN;
    - `first`: index of the first position that differs and the two values there.
    """

    kind: str
    actual_dtype: torch.dtype
    expected_dtype: torch.dtype
    actual_shape: tuple[int, ...]
    expected_shape: tuple[int, ...]
    numel: int = 0
    mismatches: int = 0
    beyond: int = 0
    max_abs: float = 0.0
    max_rel: float = 0.0
    max_ulp: int | None = None
    first: tuple[tuple[int, ...], Any, Any] | None = None
    signed_zeros: int = 0

    @property
    def close(self) -> bool:
        """Whether every value is within the tolerances of its dtype."""
        return self.kind == "bit-equal" or (self.kind == "differs" and self.beyond == 0)


def compare(actual: Tensor, expected: Tensor) -> Comparison:
    """Compare two plain CPU tensors of any dtype; tolerances are those of the expected dtype."""
    about = {
        "actual_dtype": actual.dtype,
        "expected_dtype": expected.dtype,
        "actual_shape": tuple(actual.shape),
        "expected_shape": tuple(expected.shape),
    }
    if actual.dtype != expected.dtype:
        return Comparison("dtype", **about)
    if actual.shape != expected.shape:
        return Comparison("shape", **about)
    rtol, atol = tolerances(expected.dtype)
    has_ulp = expected.dtype in _HAS_ULP
    actual, expected = _dense(actual), _dense(expected)
    differs = (actual != expected) & ~((actual != actual) & (expected != expected))
    mismatches = int(differs.sum())
    zeros = _signed_zero_mismatches(actual, expected)
    if mismatches == 0:
        ulp = 0 if has_ulp else None
        return Comparison(
            "bit-equal", **about, numel=actual.numel(), max_ulp=ulp, signed_zeros=zeros
        )
    index = tuple(int(i) for i in differs.nonzero()[0])
    found, wanted = actual[differs], expected[differs]
    absolute = _absolute_difference(found, wanted)
    size = wanted.to(torch.complex128 if wanted.is_complex() else torch.float64).abs()
    # An infinite expected value would make the allowance infinite: it must be met exactly.
    allowed = torch.where(size.isfinite(), atol + rtol * size, torch.zeros_like(size))
    return Comparison(
        "differs",
        **about,
        numel=actual.numel(),
        mismatches=mismatches,
        beyond=int((absolute > allowed).sum()),
        max_abs=float(absolute.max()),
        max_rel=float(torch.where(absolute.isinf(), absolute, absolute / size).max()),
        max_ulp=_max_ulp(found, wanted) if has_ulp else None,
        first=(index, actual[index].item(), expected[index].item()),
        signed_zeros=zeros,
    )


def ulp_distance(actual: Tensor, expected: Tensor) -> np.ndarray:
    """Number of representable values between two tensors of one float dtype, per element.

    Dawson's integer-representation distance (Bruce Dawson, "Comparing Floating Point Numbers,
    2012 Edition"): the bits of an IEEE float, read as a sign-magnitude integer, count the floats
    from zero, so that the distance is |i(actual) - i(expected)|. -0.0 and 0.0 are 0 apart, and
    the largest finite value is 1 from infinity.

    Args:
        actual, expected: float16, bfloat16, float32 or float64, of one shape, without NaN.

    Returns:
        uint64 array of that shape (wide enough: less than 2**64 float64 values exist).
    """
    a, b = _ordinal(actual), _ordinal(expected)
    # int64 subtraction wraps, and the wrapped bits read as uint64 are the true distance.
    with np.errstate(over="ignore"):
        return np.where(a >= b, a - b, b - a).astype(np.int64).view(np.uint64)


def _ordinal(values: Tensor) -> np.ndarray:
    bits = values.contiguous().view(_BITS_OF_FLOAT[values.dtype])
    lowest = torch.iinfo(bits.dtype).min
    ordinal: np.ndarray = bits.to(torch.int64).numpy()
    return np.where(ordinal >= 0, ordinal, lowest - ordinal)


def _max_ulp(found: Tensor, wanted: Tensor) -> int | None:
    found, wanted = _parts(found), _parts(wanted)
    if bool((found.isnan() | wanted.isnan()).any()):
        return None
    return int(ulp_distance(found, wanted).max())


def _absolute_difference(found: Tensor, wanted: Tensor) -> Tensor:
    """|found - wanted| of values that differ, as float64; inf where only one is NaN."""
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        a, b = _parts(found).to(torch.float64), _parts(wanted).to(torch.float64)
        same = (a == b) | (a.isnan() & b.isnan())  # inf - inf is no difference
        part = torch.where(same, torch.zeros_like(a), a - b).abs().nan_to_num(torch.inf, torch.inf)
        return torch.hypot(part[..., 0], part[..., 1]) if found.is_complex() else part
    # Integers are subtracted exactly: as float64, large neighbours would be equal.
    x, y = found.numpy(), wanted.numpy()
    with np.errstate(over="ignore"):
        exact = np.where(x >= y, x - y, y - x).astype(x.dtype)
    return torch.from_numpy(exact.view(f"u{x.dtype.itemsize}").astype(np.float64))


def _signed_zero_mismatches(actual: Tensor, expected: Tensor) -> int:
    actual, expected = _parts(actual), _parts(expected)
    if not actual.is_floating_point():
        return 0
    zero = (actual == 0) & (expected == 0)
    return int((zero & (actual.signbit() != expected.signbit())).sum())


def _parts(values: Tensor) -> Tensor:
    """Real and imaginary part in a last dimension of their own; other dtypes unchanged."""
    return torch.view_as_real(values) if values.is_complex() else values


def _dense(values: Tensor) -> Tensor:
    """Strided, resolved and of a dtype that has comparisons and arithmetic on CPU."""
    values = values.detach()
    if values.layout != torch.strided:
        values = values.to_dense()
    values = values.resolve_conj().resolve_neg()
    if values.dtype == torch.complex32:
        return values.to(torch.complex64)
    if values.is_floating_point() and values.dtype.itemsize == 1:
        return values.to(torch.float32)
    return values

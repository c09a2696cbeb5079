"""check/compare.py: what is equal and how far the rest is apart, against independent oracles."""

from __future__ import annotations

import itertools
import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from localtensor_compile.check.compare import compare, tolerances, ulp_distance

INF, NAN = float("inf"), float("nan")
untimed = settings(deadline=None)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def of(*values, dtype=torch.float32):
    return torch.tensor(values, dtype=dtype)


# ---- kinds
@pytest.mark.parametrize("dtype", [*FLOATS, torch.int64, torch.uint8, torch.bool, torch.complex64])
def test_a_tensor_equals_itself(dtype):
    value = torch.tensor([[0, 1], [1, 0]]).to(dtype)
    found = compare(value, value.clone())
    assert (found.kind, found.mismatches, found.numel, found.first) == ("bit-equal", 0, 4, None)
    assert (found.max_abs, found.max_rel, found.beyond, found.close) == (0, 0, 0, True)


def test_shape_and_dtype_are_kinds_of_their_own():
    shape = compare(torch.zeros(2, 3), torch.zeros(3, 2))
    assert (shape.kind, shape.actual_shape, shape.expected_shape) == ("shape", (2, 3), (3, 2))
    assert not shape.close
    dtype = compare(torch.zeros(2), torch.zeros(2, dtype=torch.float64))
    assert (dtype.kind, dtype.actual_dtype) == ("dtype", torch.float32)
    assert not dtype.close


def test_empty_and_zero_dim():
    assert compare(torch.zeros(0, 3), torch.zeros(0, 3)).kind == "bit-equal"
    found = compare(torch.tensor(1.0), torch.tensor(2.0))
    assert found.first == ((), 1.0, 2.0)


def test_nan_equals_nan_and_signed_zeros_are_counted():
    found = compare(of(NAN, 0.0, -0.0, 1.0), of(NAN, -0.0, -0.0, 1.0))
    assert (found.kind, found.signed_zeros, found.max_ulp) == ("bit-equal", 1, 0)


def test_one_nan_is_an_infinite_error_without_ulp():
    found = compare(of(1.0, NAN), of(1.0, 2.0))
    assert (found.kind, found.mismatches, found.beyond) == ("differs", 1, 1)
    assert (found.max_abs, found.max_rel, found.max_ulp) == (INF, INF, None)
    assert found.first[0] == (1,)


def test_infinities():
    assert compare(of(INF, -INF), of(INF, -INF)).kind == "bit-equal"
    found = compare(of(INF, 3.4e38), of(-INF, INF))
    assert (found.mismatches, found.beyond, found.max_abs) == (2, 2, INF)
    # The largest finite value is one ulp from infinity, yet not close to it.
    largest = torch.finfo(torch.float32).max
    found = compare(of(largest), of(INF))
    assert (found.max_ulp, found.close) == (1, False)


def test_first_difference_counts_and_errors():
    actual = torch.zeros(2, 3)
    actual[1, 1], actual[1, 2] = 0.5, 3.0
    expected = torch.zeros(2, 3)
    expected[1, 2] = 2.0
    found = compare(actual, expected)
    assert found.first == ((1, 1), 0.5, 0.0)
    assert (found.mismatches, found.numel, found.max_abs) == (2, 6, 1.0)
    assert found.max_rel == INF  # 0.5 against 0
    assert compare(of(3.0), of(2.0)).max_rel == 0.5


def test_layouts_and_lazy_bits_do_not_matter():
    a = torch.randn(4, 3, dtype=torch.complex64)
    assert compare(a.conj(), a.conj().resolve_conj()).kind == "bit-equal"
    assert compare(a.t(), a.t().contiguous()).kind == "bit-equal"
    sparse = torch.eye(3).to_sparse()
    assert compare(sparse, torch.eye(3)).kind == "bit-equal"


# ---- exact dtypes
def test_integers_are_subtracted_exactly():
    big = 2**62
    found = compare(of(big + 1, dtype=torch.int64), of(big, dtype=torch.int64))
    assert (found.max_abs, found.max_ulp, found.close) == (1.0, None, False)
    lo, hi = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
    assert compare(of(hi, dtype=torch.int64), of(lo, dtype=torch.int64)).max_abs == 2.0**64
    assert compare(of(3, dtype=torch.uint8), of(200, dtype=torch.uint8)).max_abs == 197


def test_bool_and_complex():
    found = compare(of(True, False, dtype=torch.bool), of(True, True, dtype=torch.bool))
    assert (found.mismatches, found.max_abs, found.first) == (1, 1.0, ((1,), False, True))
    found = compare(of(3 + 4j, dtype=torch.complex64), of(0j, dtype=torch.complex64))
    assert (found.max_abs, found.max_ulp) == (5.0, 0x40800000)  # |3+4j|, and 4.0 from 0.0
    infinite = complex(INF, 1), complex(INF, 2)
    found = compare(*(of(z, dtype=torch.complex64) for z in infinite))
    assert found.max_abs == 1.0  # the parts that are equal infinities do not count


def test_float8_has_no_ulp_and_no_tolerance():
    found = compare(*(of(v).to(torch.float8_e4m3fn) for v in (1.0, 1.125)))
    assert (found.kind, found.max_ulp, found.close) == ("differs", None, False)


# ---- tolerances
def test_tolerances_are_those_of_torch_testing():
    from torch.testing._comparison import _DTYPE_PRECISIONS

    for dtype in (*FLOATS, torch.complex32, torch.complex64, torch.complex128):
        assert tolerances(dtype) == _DTYPE_PRECISIONS[dtype]
    assert tolerances(torch.int64) == (0.0, 0.0)


@untimed
@given(
    st.sampled_from(FLOATS),
    st.lists(st.tuples(st.floats(-1e4, 1e4), st.floats(-3, 3)), min_size=1, max_size=5),
)
def test_close_means_that_assert_close_passes(dtype, pairs):
    rtol, atol = tolerances(dtype)
    expected = torch.tensor([value for value, _ in pairs], dtype=dtype)
    offsets = torch.tensor([offset for _, offset in pairs], dtype=torch.float64)
    actual = (expected.double() + offsets * (atol + rtol * expected.double().abs())).to(dtype)
    allowed = atol + rtol * expected.double().abs()
    margin = ((actual.double() - expected.double()).abs() / allowed - 1).abs().min()
    try:
        torch.testing.assert_close(actual, expected)
        passes = True
    except AssertionError:
        passes = False
    if margin > 1e-2:  # torch computes the limit itself in low precision
        assert compare(actual, expected).close == passes


# ---- ULP distance
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_ulp_is_the_number_of_values_between_all_of_a_dtype(dtype):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = bits.view(dtype)
    values = values[~values.isnan()]
    values = values[values.double().argsort(stable=True)]
    # Each step to the next larger value is 1, but for the one from -0.0 to 0.0.
    steps = ulp_distance(values[1:], values[:-1])
    zero_to_zero = ((values[1:] == 0) & (values[:-1] == 0)).numpy()
    assert (steps == np.where(zero_to_zero, 0, 1)).all()
    assert ulp_distance(values[-1:], values[:1]).item() == steps.sum()


def _ordinal(value, code, integer):
    """The definition, in Python: position of a float among all floats, 0 for zero."""
    bits = struct.unpack(integer, struct.pack(code, value))[0]
    size = 8 * struct.calcsize(integer)
    sign, magnitude = bits >> (size - 1), bits & ((1 << (size - 1)) - 1)
    return -magnitude if sign else magnitude


@untimed
@given(st.floats(allow_nan=False, width=32), st.floats(allow_nan=False, width=32))
def test_ulp_float32(a, b):
    expected = abs(_ordinal(a, "f", "I") - _ordinal(b, "f", "I"))
    assert ulp_distance(of(a), of(b)).item() == expected
    assert ulp_distance(of(b), of(a)).item() == expected


@untimed
@given(st.floats(allow_nan=False), st.floats(allow_nan=False))
def test_ulp_float64(a, b):
    expected = abs(_ordinal(a, "d", "Q") - _ordinal(b, "d", "Q"))
    found = ulp_distance(of(a, dtype=torch.float64), of(b, dtype=torch.float64))
    assert found.item() == expected  # up to 2**64 - 2**53: more than int64 holds


@untimed
@given(st.floats(-1e300, 1e300), st.integers(0, 5))
def test_ulp_of_nextafter(value, steps):
    moved = value
    for _ in range(steps):
        moved = math.nextafter(moved, math.inf)
    found = ulp_distance(of(moved, dtype=torch.float64), of(value, dtype=torch.float64))
    assert found.item() == steps


def test_max_ulp_is_over_mismatches():
    pairs = list(itertools.product((1.0, 2.0), repeat=2))
    actual, expected = (of(*column) for column in zip(*pairs))
    assert compare(actual, expected).max_ulp == 2**23

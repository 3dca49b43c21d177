"""Compiled kernels: products with matrices of small integers, without ever widening the matrix in memory.

One call computes, for few rows of x (B x n),

    y = ((x o steps) . Z^T) o rows + bias            Z (m x n) = dense part + sparse remainder

with Z's dense part in 4, 8 or 16 bits. Arguments are addresses: at batch 1 a call lasts microseconds, and unboxing a
dozen arrays would take as long. Whoever calls answers for the sizes.

Output rows are shared out among the threads of the OpenMP pool that torch itself runs on (a second pool would fight
it for the processors). Each row is summed by one thread in one order: results do not depend on their number.

Where the processor multiplies bytes (AVX512-VNNI, or AVX2 for codes of at most 6 bits), ``x o steps`` is cut into three
signed bytes (a fixed point of 23 bits below its largest entry) and the dot products are exact integers; elsewhere, and
for wider codes, they are sums in float32. Both stay within a few 1e-7 of float64, relative to the norm of y. For more
than a few rows of x, codes of 4 bits are cut in two once, and not for every four rows.

Nothing here may be called where numba is missing; :mod:`sqf_integers` has a torch path.
"""

from __future__ import annotations

import ctypes
import math
from functools import lru_cache
from typing import Any

import numpy as np

from .sqf_jit import HAVE_NUMBA, jit
from .sqf_tiles import byte_tile, float_tile
from .sqf_vectors import (
    BYTE_PRODUCTS,
    BYTE_TILE,
    INT4,
    INT6,
    INT8,
    INT16,
    LANES,
    LARGEST_BYTE,
    NONE,
    TALL,
    TILE,
    address_as,
    fetch,
    fetch_add,
    parallel,
)

try:
    from numba import carray, cfunc, types
except ImportError:  # nothing here is called then
    carray = cfunc = types = None  # type: ignore[assignment]

REVISION = 12
"""Of the vectors and tiles; see :mod:`sqf_vectors`."""
FLOAT32, BFLOAT16 = 0, 1
"""Type of x and y."""
LARGEST_INT4 = 7
"""Codes in 4 bits lie in [-7, 7], so that ``16 high + low`` fits a signed byte."""
SLACK = 64
"""Bytes that must be readable behind the dense part: vectors run over the end of its last row, against zeros of x."""

CODES, KIND, M, N, STEPS, ROWS, STARTS, COLUMNS, VALUES, GOMP, WORKER = range(11)
"""Fields of a matrix's descriptor, int64 each: addresses (0: there is none) of the dense part, float32 steps (n) and
rows (m), of the sparse remainder's int32 starts (m + 1), uint16 columns and int16 values, and of what forks and works
(see :class:`Kernels`). KIND is a storage."""

# Fields of a call, int64 each. X: the scaled inputs, float32; INPUTS: what the inner products take.
(_MATRIX, _TASK, _X, _X_STRIDE, _INPUTS, _INPUT_STRIDE, _PLANE, _COUNT, _SCALES, _Y, _BIAS, _BATCH, _DTYPE, _IDS,
 _FIRST, _LAST, _CHUNK, _NEXT) = range(18)  # fmt: skip
_CALL = 18
_FIELDS = 11
_FLOATS, _BYTES, _DECODE = range(3)
_LARGEST = 8290000.0
"""Of a fixed-point entry: its three signed digits to the base 256 stay within [-128, 127]."""
_LONGEST = 65536
"""Columns whose sums of products of bytes stay below 2^31."""
_FIRST_BYTES = 4096
_THREAD_CODES = 1 << 16
"""Products that are worth a thread: waking one costs some microseconds."""
_CUT_FROM = 8
"""Rows of x from which it pays to cut a chunk's bytes of two codes first."""
_LINES = math.lcm(TILE, TALL)  # rows of codes that leave no tile over
_CHUNK_CODES = 1 << 15
"""Codes that a thread takes at a time, at least."""

_int64 = address_as("int64")
_int32 = address_as("int32")
_int16 = address_as("int16")
_int8 = address_as("int8")
_uint16 = address_as("uint16")
_float32 = address_as("float32")
_float64 = address_as("float64")
_fetch = fetch()
_fetch_add = fetch_add()
_parallel = parallel()


@jit
def _row_bytes(kind: int, n: int) -> int:
    """Return the distance of two rows of the dense part."""
    return (n + 1) // 2 if kind == INT4 else n * 2 if kind == INT16 else n


@jit
def _to_bfloat16(bits: int) -> int:
    """Return the upper half of a float32's bits, rounded to nearest even; a NaN stays one."""
    if (bits & 0x7FFFFFFF) > 0x7F800000:
        return 0x7FC0
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16


@jit
def _cut(pairs: Any, codes: Any) -> None:  # noqa: ANN401
    """Fill codes (n) with those of a row of bytes."""
    low, high = codes[: len(pairs)], codes[len(pairs) :]
    for k in range(len(low)):  # narrow integers at each step: numba's own 64 bits would make short vectors
        low[k] = np.int8(np.int8((pairs[k] & np.int8(15)) ^ np.int8(8)) - np.int8(8))
    for k in range(len(high)):
        high[k] = np.int8(np.int8(pairs[k] + np.int8(8)) >> np.int8(4))


@jit
def _multiply_rows(address: int, first: int, last: int) -> None:  # noqa: C901 (a nest of loops)
    """Fill the columns first..last of y."""
    call = carray(_int64(address), _CALL)
    matrix = carray(_int64(call[_MATRIX]), _FIELDS)
    kind, m, n, batch = INT8 if matrix[KIND] == INT6 else matrix[KIND], matrix[M], matrix[N], call[_BATCH]
    x = carray(_float32(call[_X]), (batch, call[_X_STRIDE] // 4))
    rows, bias = carray(_float32(matrix[ROWS]), m), carray(_float32(call[_BIAS]), m)
    starts, columns = carray(_int32(matrix[STARTS]), m + 1), carray(_uint16(matrix[COLUMNS]), 1)
    values = carray(_int16(matrix[VALUES]), 1)
    scales = carray(_float64(call[_SCALES]), (batch, 2))
    y, y_half = carray(_float32(call[_Y]), (batch, m)), carray(_uint16(call[_Y]), (batch, m))
    exact = call[_TASK] == _BYTES
    most = (1 if kind == INT4 or BYTE_PRODUCTS < 64 else 2) if exact else 4
    z_stride, x_stride = _row_bytes(kind, n), call[_INPUT_STRIDE]
    cut = kind == INT4 and not exact and batch >= _CUT_FROM
    panel = np.zeros((last - first) * n + SLACK if cut else 0, np.int8)
    if cut:
        for i in range(first, last):
            _cut(carray(_int8(matrix[CODES] + i * z_stride), z_stride), panel[(i - first) * n : (i + 1 - first) * n])
        kind, z_stride = INT8, n
    sums, digits = np.zeros(16 * TALL, np.float32), np.zeros(16 * TALL, np.int32)  # written in whole vectors
    lines = np.zeros((most, last - first), np.float32)
    bits = lines.view(np.uint32)
    group = 0
    while group < batch:
        wide = most if batch - group >= most else 1
        i = first
        while i < last and kind != NONE:
            tile = BYTE_TILE if exact else TALL if wide == 1 else TILE
            tall = tile if last - i >= tile else 1
            now = wide if tall == tile else 1
            z_start = panel.ctypes.data - first * n if cut else matrix[CODES]  # here: so the panel lives until now
            z = z_start + i * z_stride
            for b in range(0, wide, now):
                inputs = call[_INPUTS] + (group + b) * x_stride
                if exact:
                    byte_tile(
                        kind, tall, now, z, z_stride, inputs, x_stride, call[_PLANE], call[_COUNT], digits.ctypes.data
                    )
                    for c in range(now):
                        unit, offset = scales[group + b + c, 0], scales[group + b + c, 1]
                        for r in range(tall):
                            d = 3 * (r * now + c)
                            total = np.int64(digits[d + 2]) * 65536 + np.int64(digits[d + 1]) * 256 + digits[d]
                            lines[b + c, i - first + r] = total * unit - offset
                else:
                    float_tile(
                        kind, tall, now, z, z_stride, inputs, x_stride, call[_PLANE], call[_COUNT], sums.ctypes.data
                    )
                    for c in range(now):
                        for r in range(tall):
                            lines[b + c, i - first + r] = sums[r * now + c]
            i += tall
        for c in range(wide):
            line = lines[c]
            if matrix[STARTS] != 0:
                for i in range(first, last):
                    total = np.float32(0)
                    for e in range(starts[i], starts[i + 1]):
                        total += np.float32(values[e]) * x[group + c, columns[e]]
                    line[i - first] += total
            if call[_BIAS] != 0:
                for i in range(first, last):
                    line[i - first] = line[i - first] * rows[i] + bias[i]
            else:
                for i in range(first, last):
                    line[i - first] *= rows[i]
            if call[_DTYPE] == FLOAT32:
                y[group + c, first:last] = line
            else:
                for i in range(first, last):
                    y_half[group + c, i] = _to_bfloat16(bits[c, i - first])
            if kind == NONE:
                line[:] = 0
        group += wide


@jit
def _decode_rows(address: int, first: int, last: int) -> None:  # noqa: C901 (a nest of loops)
    """Fill the rows first..last of y with rows of the matrix."""
    call = carray(_int64(address), _CALL)
    matrix = carray(_int64(call[_MATRIX]), _FIELDS)
    kind, m, n = matrix[KIND], matrix[M], matrix[N]
    steps, rows = carray(_float32(matrix[STEPS]), n), carray(_float32(matrix[ROWS]), m)
    starts, columns = carray(_int32(matrix[STARTS]), m + 1), carray(_uint16(matrix[COLUMNS]), 1)
    values, ids = carray(_int16(matrix[VALUES]), 1), carray(_int64(call[_IDS]), 1)
    stride = _row_bytes(kind, n)
    line, octets = np.zeros(n, np.float32), np.zeros(n, np.int8)
    bits = line.view(np.uint32)
    for i in range(first, last):
        row = ids[i] if call[_IDS] != 0 else call[_FIRST] + i
        z = matrix[CODES] + row * stride
        if kind == INT4:
            _cut(carray(_int8(z), stride), octets)
            z = octets.ctypes.data
        if kind in (INT4, INT6, INT8):
            narrow = carray(_int8(z), n)
            for k in range(n):
                line[k] = np.float32(narrow[k])
        elif kind == INT16:
            words = carray(_int16(z), n)
            for k in range(n):
                line[k] = np.float32(words[k])
        else:
            line[:] = 0
        if matrix[STARTS] != 0:
            for e in range(starts[row], starts[row + 1]):
                line[columns[e]] += np.float32(values[e])
        scale = rows[row]
        if call[_DTYPE] == FLOAT32:
            whole = carray(_float32(call[_Y] + 4 * i * n), n)
            for k in range(n):
                whole[k] = line[k] * steps[k] * scale
        else:
            short = carray(_uint16(call[_Y] + 2 * i * n), n)
            for k in range(n):
                line[k] = line[k] * steps[k] * scale
            for k in range(n):
                word = bits[k]
                short[k] = (word + np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)


@jit
def _take_chunks(address: int) -> None:
    """Take chunks of rows until none is left: what each thread does."""
    call = carray(_int64(address), _CALL)
    while True:
        first = _fetch_add(address + 8 * _NEXT, call[_CHUNK])
        if first >= call[_LAST]:
            break
        last = min(first + call[_CHUNK], call[_LAST])
        if call[_TASK] == _DECODE:
            _decode_rows(address, first, last)
        else:
            _multiply_rows(address, first, last)


@jit
def _run(call: Any, matrix: Any, batch: int, threads: int) -> None:  # noqa: ANN401
    n, rows = max(matrix[N], 1), call[_LAST]
    threads = min(threads, 1 + rows * n * batch // _THREAD_CODES)
    chunks = -(-rows // ((_CHUNK_CODES // n // _LINES + 1) * _LINES))
    chunks = max(-(-chunks // threads) * threads, 1)  # as many for each thread
    call[_CHUNK] = max(-(-rows // (chunks * _LINES)) * _LINES, _LINES)
    call[_NEXT] = 0
    if threads > 1 and matrix[GOMP] != 0 and call[_LAST] > call[_CHUNK]:
        _parallel(matrix[GOMP], matrix[WORKER], call.ctypes.data, threads)
    else:
        _take_chunks(call.ctypes.data)


@jit
def _fixed_point(x: Any, n: int, halved: bool, digits: Any, scale: Any) -> bool:  # noqa: ANN401
    """Cut one row x (n) of float32 into planes of signed digits to the base 256; scale = (unit, offset's product).

    Return False where the row has no such form: infinities, NaN, next to nothing but zeros.
    """
    bits = x.view(np.int32)
    highest = np.zeros(1, np.int32)
    top = np.int32(0)
    for k in range(n):
        top = max(top, np.int32(bits[k] & np.int32(0x7FFFFFFF)))  # floats order as their bits do: no NaN to heed
    if top >= 0x7F800000 or 0 < top < 0x0D000000:
        return False
    highest[0] = top
    largest = highest.view(np.float32)[0]
    inverse = np.float32(_LARGEST / largest) if largest > 0 else np.float32(0)
    half = (n + 1) // 2 if halved else n
    total = np.int64(0)
    for part in range(2 if halved else 1):
        start = part * half
        inputs, count = x[start:], min(half, n - start)
        low, middle, high = digits[3 * part], digits[3 * part + 1], digits[3 * part + 2]
        for k in range(count):
            value = np.int32(np.floor(inputs[k] * inverse + np.float32(0.5)))
            total += value
            carried = np.int32(np.int32(value + np.int32(128)) >> np.int32(8))
            low[k] = np.int8(value)
            middle[k] = np.int8(carried)
            high[k] = np.int8(np.int32(carried + np.int32(128)) >> np.int32(8))
    scale[0] = 1.0 / inverse if largest > 0 else 0.0
    scale[1] = scale[0] * total * (8 if halved else LARGEST_BYTE + 1)
    return True


def _multiply(  # noqa: C901 (what each kind of product needs)
    descriptor: int, x: int, y: int, bias: int, batch: int, dtype: int, threads: int
) -> int:
    matrix = carray(_int64(descriptor), _FIELDS)
    kind, m, n = matrix[KIND], matrix[M], matrix[N]
    steps = carray(_float32(matrix[STEPS]), n)
    width = (n + 1) // 2 if kind == INT4 else n
    for line in range(0, _FIRST_BYTES, 64):  # on their way while x is scaled
        _fetch(matrix[CODES] + line)
        if line < 4 * m:
            _fetch(matrix[ROWS] + line)
    scaled = np.zeros((batch, (n + LANES - 1) // LANES * LANES), np.float32)
    if dtype == FLOAT32:
        singles = carray(_float32(x), (batch, n))
        for b in range(batch):
            for k in range(n):
                scaled[b, k] = singles[b, k] * steps[k]
    else:
        halves = carray(_uint16(x), (batch, n))
        bits = scaled.view(np.uint32)
        for b in range(batch):
            for k in range(n):
                bits[b, k] = np.uint32(halves[b, k]) << 16
            for k in range(n):
                scaled[b, k] *= steps[k]
    call, scales = np.zeros(_CALL, np.int64), np.zeros((batch, 2), np.float64)
    call[_MATRIX], call[_TASK], call[_Y], call[_BIAS] = descriptor, _FLOATS, y, bias
    call[_BATCH], call[_DTYPE], call[_LAST], call[_SCALES] = batch, dtype, m, scales.ctypes.data
    call[_X], call[_X_STRIDE] = scaled.ctypes.data, 4 * scaled.shape[1]
    if BYTE_PRODUCTS == 64:
        exact = n <= _LONGEST and (kind in (INT6, INT8) or (kind == INT4 and batch < 4))
    else:
        exact = BYTE_PRODUCTS > 0 and n <= _LONGEST and kind in (INT4, INT6) and batch < 4
    plane = (width + 63) // 64 * 64 if exact else 0
    digits = np.zeros((batch, 6 if kind == INT4 else 3, plane), np.int8)
    if exact:
        for b in range(batch):
            exact = exact and _fixed_point(scaled[b], n, kind == INT4, digits[b], scales[b])
    halved = kind == INT4 and not exact and batch < _CUT_FROM
    pairs = np.zeros((batch if halved else 0, 2, (width + LANES - 1) // LANES * LANES), np.float32)
    if exact:
        call[_TASK], call[_INPUTS] = _BYTES, digits.ctypes.data
        call[_INPUT_STRIDE], call[_PLANE], call[_COUNT] = digits.shape[1] * plane, plane, plane // 64
    elif halved:
        for b in range(batch):
            for k in range(width):
                high = scaled[b, k + width] * np.float32(1 / 16) if k + width < n else np.float32(0)
                pairs[b, 0, k] = high
                pairs[b, 1, k] = (scaled[b, k] - high) * np.float32(2.0**-28)
        call[_INPUTS], call[_PLANE] = pairs.ctypes.data, 4 * pairs.shape[2]
        call[_INPUT_STRIDE], call[_COUNT] = 8 * pairs.shape[2], pairs.shape[2] // LANES
    else:
        call[_INPUTS], call[_INPUT_STRIDE] = scaled.ctypes.data, 4 * scaled.shape[1]
        call[_COUNT] = scaled.shape[1] // LANES
    _run(call, matrix, batch, threads)
    return call[_NEXT] + scaled.size + digits.size + pairs.size + scales.size  # used here: so they live until now


def _decode(descriptor: int, ids: int, first: int, count: int, y: int, dtype: int, threads: int) -> int:
    matrix = carray(_int64(descriptor), _FIELDS)
    call = np.zeros(_CALL, np.int64)
    call[_MATRIX], call[_TASK], call[_Y], call[_DTYPE] = descriptor, _DECODE, y, dtype
    call[_IDS], call[_FIRST], call[_LAST] = ids, first, count
    _run(call, matrix, 1, threads)
    return call[_NEXT]


def _worker(call: int) -> None:
    _take_chunks(call)


class Kernels:
    """The compiled entry points, for calls with addresses and integers; see the module.

    Attributes:
        multiply: ``(descriptor, x, y, bias, batch, dtype, threads)``: y = x . W^T + bias. x (batch, n)
            and y (batch, m) are contiguous, of ``dtype``; bias float32 (m), or 0.
        decode: ``(descriptor, ids, first, count, y, dtype, threads)``: y (count, n) = rows of W, with
            the int64 indices ``ids``, or from ``first`` on where that is 0.
        gomp: address of the fork of torch's OpenMP pool; 0 where torch has another: one thread works then.
        worker: what the threads run.
    """

    def __init__(self) -> None:
        worker = cfunc(types.void(types.int64), cache=True)(_worker)
        self.worker: int = worker.address or 0
        self.gomp = _gomp()
        signature = types.int64(*[types.int64] * 7)
        pointer = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * 7)
        self._keep = [worker, *(cfunc(signature, cache=True)(f) for f in (_multiply, _decode))]
        self.multiply, self.decode = (pointer(f.address or 0) for f in self._keep[1:])


def _gomp() -> int:
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value or 0
    except (AttributeError, OSError, TypeError):  # no such function, or a system where None names no library
        return 0


@lru_cache(maxsize=1)
def kernels() -> Kernels | None:
    """Return the compiled kernels (the first use on a machine takes some seconds), or None without numba."""
    return Kernels() if HAVE_NUMBA else None

"""Compiled kernels: products with matrices of small integers, without ever widening the matrix in memory.

One call computes, for rows of x (B x n),

    y = ((x o steps) . Z^T) o rows + bias            Z (m x n) = dense part + sparse remainder

with Z's dense part in 4, 8 or 16 bits. Arguments are addresses: at batch 1 a call lasts microseconds, and unboxing a
dozen arrays would take as long. Whoever calls answers for the sizes.

Output rows are shared out among the threads of the OpenMP pool that torch itself runs on (a second pool would fight
it for the processors). Each row is summed by one thread in one order: results do not depend on their number.

Where the processor multiplies bytes (AVX512-VNNI, or AVX2 for codes of at most 6 bits), ``x o steps`` is cut into three
signed bytes (a fixed point of 23 bits below its largest entry) and the dot products are exact integers; elsewhere, and
for wider codes, they are sums in float32. Both stay within a few 1e-7 of float64, relative to the norm of y. Many rows
of x go another way: :mod:`sqf_panels`.

Nothing here may be called where numba is missing; :mod:`sqf_integers` has a torch path.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from .sqf_calls import (
    ADD,
    BATCH,
    BFLOAT16,
    BIAS,
    BY_LINES,
    BY_PANELS,
    BYTES,
    CALL_FIELDS,
    CHUNK,
    CODES,
    COLUMNS,
    COUNT,
    DECODE,
    DTYPE,
    FIRST_ROW,
    FIXED,
    FLOAT32,
    FLOATS,
    GOMP,
    IDS,
    INPUT,
    KIND,
    LAST,
    LINE,
    LINES,
    MATRIX,
    MATRIX_FIELDS,
    OPERAND,
    OPERAND_STRIDE,
    OUTPUT,
    PANELS,
    PLANE,
    RANK,
    ROUND,
    ROWS,
    SCALED_STRIDE,
    SCALES,
    SCRATCH,
    SCRATCH_STRIDE,
    STARTED,
    STARTS,
    STEPS,
    TAKEN,
    TASK,
    TEAM,
    VALUES,
    WORKER,
    M,
    N,
    at_float32,
    at_float64,
    at_int8,
    at_int16,
    at_int32,
    at_int64,
    at_uint16,
    entry_bytes,
    in_lines,
    padded,
    round_codes,
    round_row,
    row_bytes,
    scale_row,
    to_bfloat16,
    widen_row,
)
from .sqf_jit import HAVE_NUMBA, carray, cfunc, jit, types
from .sqf_panels import multiply_panels, scratch_bytes, widened_at_a_time, words_of
from .sqf_tiles import byte_tile, float_tile
from .sqf_vectors import (
    BYTE_PRODUCTS,
    BYTE_TILE,
    INT4,
    INT6,
    INT8,
    LANES,
    LARGEST_BYTE,
    NONE,
    PANEL,
    TALL,
    TILE,
    WIDE,
    fetch,
    fetch_add,
    give_up,
    parallel,
    rank,
)

REVISION = 30
"""Of the vectors and tiles; see :mod:`sqf_vectors`."""
_LARGEST = 8290000.0
"""Of a fixed-point entry: its three signed digits to the base 256 stay within [-128, 127]."""
_LONGEST = 65536
"""Columns whose sums of products of bytes stay below 2^31."""
_FIRST_BYTES = 4096
_THREAD_CODES = 1 << 16
"""Products that are worth a thread: waking one costs some microseconds."""
_FEW = LANES // 8
"""Rows of x beyond whole panels that are multiplied one by one: another panel would take longer."""
_MOST, _MOST_INPUTS = 512, 1 << 20
"""Rows of x, and numbers in them, that are laid side by side at a time: at most so many, but WIDE panels."""
_PANELS_EACH = 8
"""Panels of inputs for each thread from which these are shared out, and not rows of codes: all widen all codes then."""
_LINES, _PANEL_LINES = math.lcm(TILE, TALL, LANES), math.lcm(PANEL, LANES)  # rows of codes that leave nothing over
_CHUNK_CODES = 1 << 17
"""Codes that a thread takes at a time, about: of what is fetched ahead at a chunk's end, nothing is for this thread."""

_fetch = fetch()
_fetch_add = fetch_add()
_give_up = give_up()
_parallel = parallel()
_rank = rank()


@jit
def _remainder_sums(matrix: Any, first: int, last: int, fixed: Any, sums: Any) -> None:  # noqa: ANN401
    """Fill sums (last - first) with the remainder's products, of its rows first..last with integers fixed (n).

    They are differences of one running sum, which is exact: a loop over each row's few nonzeros ends at another number
    every time, which no processor foresees.
    """
    starts = carray(at_int32(matrix[STARTS]), matrix[M] + 1)
    start, end = starts[first], starts[last]
    values = carray(at_int16(matrix[VALUES]), end)[start:end]
    columns = carray(at_uint16(matrix[COLUMNS]), end)[start:end]
    running = np.empty(len(values) + 1, np.int64)
    total, behind = np.int64(0), running[1:]
    for e in range(len(values)):
        total += np.int64(values[e]) * np.int64(fixed[columns[e]])
        behind[e] = total
    running[0] = before = np.int64(0)
    for i in range(last - first):
        now = running[starts[first + i + 1] - start]
        sums[i] = now - before
        before = now


@jit
def _multiply_rows(address: int, first: int, last: int, passing: bool) -> None:  # noqa: C901 (a nest of loops)
    """Fill the columns first..last of y; codes that are ``passing`` leave the caches to what comes next."""
    call = carray(at_int64(address), CALL_FIELDS)
    matrix = carray(at_int64(call[MATRIX]), MATRIX_FIELDS)
    kind, m, n, batch = INT8 if matrix[KIND] == INT6 else matrix[KIND], matrix[M], matrix[N], call[BATCH]
    x = carray(at_float32(call[INPUT]), (batch, call[SCALED_STRIDE] // 4))
    rows, bias = carray(at_float32(matrix[ROWS]), m), carray(at_float32(call[BIAS]), m)
    starts, columns = carray(at_int32(matrix[STARTS]), m + 1), carray(at_uint16(matrix[COLUMNS]), 1)
    values = carray(at_int16(matrix[VALUES]), 1)
    scales = carray(at_float64(call[SCALES]), (batch, 2))
    y, y_half = carray(at_float32(call[OUTPUT]), (batch, m)), carray(at_uint16(call[OUTPUT]), (batch, m))
    exact = call[TASK] == BYTES
    most = (1 if kind == INT4 or BYTE_PRODUCTS < 64 else 2) if exact else 4
    z_stride, x_stride = row_bytes(kind, n), call[OPERAND_STRIDE]
    count = last - first
    lines = np.zeros((most, count), np.float32)
    bits = lines.view(np.uint32)
    sums = np.zeros(16 * TALL, np.float32)  # written in whole vectors, as the digits
    digits = np.zeros(3 * most * count + 16 * TALL if exact else 0, np.int32)
    fixed, apart = carray(at_int32(call[FIXED]), (batch, n)), np.zeros(count if exact else 0, np.float64)
    group = 0
    while group < batch:
        wide = most if batch - group >= most else 1
        tile = BYTE_TILE if exact else TALL if wide == 1 else TILE
        i = first
        while i < last and kind != NONE:
            tall = tile if last - i >= tile else 1
            now = wide if tall == tile else 1
            z = matrix[CODES] + i * z_stride
            for b in range(0, wide, now):
                inputs = call[OPERAND] + (group + b) * x_stride
                if exact:
                    out = digits.ctypes.data + 12 * ((i - first) * wide + b)
                    byte_tile(kind, tall, now, z, z_stride, inputs, x_stride, call[PLANE], call[COUNT], out)
                else:
                    float_tile(
                        kind, tall, now, z, z_stride, inputs, x_stride, call[PLANE], call[COUNT], sums.ctypes.data
                    )
                    for c in range(now):
                        for r in range(tall):
                            lines[b + c, i - first + r] = sums[r * now + c]
            if passing:
                for line in range(z, z + tall * z_stride, LINE):
                    _give_up(line)
            i += tall
        for c in range(wide if exact else 0):  # a loop of its own: vectors
            unit, offset, line = scales[group + c, 0], scales[group + c, 1], lines[c]
            if matrix[STARTS] != 0:
                _remainder_sums(matrix, first, last, fixed[group + c], apart)
            for r in range(count):
                d = 3 * (r * wide + c)  # the sums are integers below 2^53
                total = np.float64(digits[d + 2]) * 65536 + np.float64(digits[d + 1]) * 256 + np.float64(digits[d])
                line[r] = (total + apart[r]) * unit - offset
        for c in range(wide):
            line = lines[c]
            if matrix[STARTS] != 0 and not exact:
                for i in range(first, last):
                    total = np.float32(0)
                    for e in range(starts[i], starts[i + 1]):
                        total += np.float32(values[e]) * x[group + c, columns[e]]
                    line[i - first] += total
            if call[BIAS] != 0:
                for i in range(first, last):
                    line[i - first] = line[i - first] * rows[i] + bias[i]
            else:
                for i in range(first, last):
                    line[i - first] *= rows[i]
            if call[DTYPE] == FLOAT32:
                y[group + c, first:last] = line
            else:
                for i in range(first, last):
                    y_half[group + c, i] = to_bfloat16(bits[c, i - first])
            if kind == NONE:
                line[:] = 0
        group += wide


@jit
def _decode_rows(address: int, first: int, last: int) -> None:
    """Fill the rows first..last of y with rows of the matrix."""
    call = carray(at_int64(address), CALL_FIELDS)
    matrix = carray(at_int64(call[MATRIX]), MATRIX_FIELDS)
    n, ids = matrix[N], carray(at_int64(call[IDS]), 1)
    steps, rows = carray(at_float32(matrix[STEPS]), n), carray(at_float32(matrix[ROWS]), matrix[M])
    line = np.zeros(n, np.float32)
    for i in range(first, last):
        row = ids[i] if call[IDS] != 0 else call[FIRST_ROW] + i
        widen_row(matrix, row, line)
        scale = rows[row]
        if call[DTYPE] == FLOAT32:
            whole = carray(at_float32(call[OUTPUT] + 4 * i * n), n)
            for k in range(n):
                whole[k] = line[k] * steps[k] * scale
        else:
            for k in range(n):
                line[k] = line[k] * steps[k] * scale
            round_row(line, carray(at_uint16(call[OUTPUT] + 2 * i * n), n))


@jit
def _round_codes(address: int, first: int, last: int) -> None:
    """Fill the rows first..last of y, bfloat16, with rows of codes times their factors."""
    call = carray(at_int64(address), CALL_FIELDS)
    matrix = carray(at_int64(call[MATRIX]), MATRIX_FIELDS)
    n = matrix[N]
    line = np.zeros(n, np.float32)
    for i in range(first, last):
        row = call[FIRST_ROW] + i
        halves = carray(at_uint16(call[OUTPUT] + 2 * i * n), n)
        round_codes(matrix, row, matrix[ROWS] + 4 * row, line, halves)


@jit
def _round_inputs(address: int, first: int, last: int) -> None:
    """Fill the rows first..last of the operand, bfloat16, with rows of x times the steps."""
    call = carray(at_int64(address), CALL_FIELDS)
    matrix = carray(at_int64(call[MATRIX]), MATRIX_FIELDS)
    n = matrix[N]
    steps, line = carray(at_float32(matrix[STEPS]), n), np.zeros(n, np.float32)
    for i in range(first, last):
        scale_row(call[INPUT] + 2 * i * n, BFLOAT16, n, steps, line)
        round_row(line, carray(at_uint16(call[OPERAND] + 2 * i * n), n))


@jit
def _add_products(address: int, first: int, last: int) -> None:
    """Add to the columns first..last of y the products of x, float32, with a matrix that has nothing but nonzeros."""
    call = carray(at_int64(address), CALL_FIELDS)
    matrix = carray(at_int64(call[MATRIX]), MATRIX_FIELDS)
    m, n, batch = matrix[M], matrix[N], call[BATCH]
    steps, rows = carray(at_float32(matrix[STEPS]), n), carray(at_float32(matrix[ROWS]), m)
    starts, columns = carray(at_int32(matrix[STARTS]), m + 1), carray(at_uint16(matrix[COLUMNS]), 1)
    values = carray(at_int16(matrix[VALUES]), 1)
    x, halves = carray(at_float32(call[INPUT]), (batch, n)), carray(at_uint16(call[OUTPUT]), (batch, m))
    y, one = carray(at_float32(call[OUTPUT]), (batch, m)), np.zeros(1, np.float32)
    bits = one.view(np.uint32)
    for i in range(first, last):
        if starts[i] == starts[i + 1]:
            continue
        for b in range(batch):
            total = np.float32(0)
            for e in range(starts[i], starts[i + 1]):
                total += np.float32(values[e]) * (x[b, columns[e]] * steps[columns[e]])
            if call[DTYPE] == FLOAT32:
                y[b, i] += total * rows[i]
            else:
                bits[0] = np.uint32(halves[b, i]) << np.uint32(16)
                one[0] += total * rows[i]
                halves[b, i] = to_bfloat16(bits[0])


@jit
def _take_chunks(address: int) -> None:
    """Take chunks of rows until none is left: what each thread does.

    A thread begins where its share of them begins, if all had equal ones: torch's products share rows out so, too, and
    need not fetch from another processor's caches what this one has decoded. It goes on with what others left.
    """
    call = carray(at_int64(address), CALL_FIELDS)
    matrix = carray(at_int64(call[MATRIX]), MATRIX_FIELDS)
    scratch = call[SCRATCH] + call[SCRATCH_STRIDE] * _fetch_add(address + 8 * STARTED, 1)
    numbered = call[TEAM] > 1 and matrix[RANK] != 0
    rank = _rank(matrix[RANK]) if numbered else 0
    # Whoever called has other things to do between two products; on one thread, giving lines up takes what it brings.
    passing = numbered and rank == 0 and call[BATCH] == 1
    chunks = -(-call[LAST] // call[CHUNK])
    for k in range(chunks):
        chunk = (rank * chunks // call[TEAM] + k) % chunks
        if _fetch_add(call[TAKEN] + 8 * chunk, 1) != 0:
            continue
        first = chunk * call[CHUNK]
        last = min(first + call[CHUNK], call[LAST])
        if call[TASK] == DECODE:
            _decode_rows(address, first, last)
        elif call[TASK] == ROUND:
            inputs = call[COUNT]
            _round_inputs(address, min(first, inputs), min(last, inputs))
            _round_codes(address, max(first, inputs) - inputs, max(last, inputs) - inputs)
        elif call[TASK] == ADD:
            _add_products(address, first, last)
        elif call[TASK] in (BY_LINES, BY_PANELS):
            multiply_panels(address, first, last, scratch)
        else:
            _multiply_rows(address, first, last, passing)


@jit
def _chunk(rows: int, lines: int, threads: int) -> int:
    """Return how many rows a thread takes at a time: ``lines`` or somewhat more, and as many for each thread."""
    chunks = -(-rows // ((lines // _LINES + 1) * _LINES))
    chunks = max(-(-chunks // threads) * threads, 1)
    return max(-(-rows // (chunks * _LINES)) * _LINES, _LINES)


@jit
def _worth(threads: int, products: int) -> int:
    """Return how many threads some products are worth, of those there are."""
    return min(threads, 1 + products // _THREAD_CODES)


@jit
def _run(call: Any, matrix: Any, batch: int, threads: int) -> None:  # noqa: ANN401
    n, rows = max(matrix[N], 1), call[LAST]
    threads = _worth(threads, rows * n * batch)
    call[CHUNK] = _chunk(rows, _CHUNK_CODES // n, threads)
    _share_out(call, matrix, threads)


@jit
def _share_out(call: Any, matrix: Any, threads: int) -> None:  # noqa: ANN401
    taken = np.zeros(-(-call[LAST] // call[CHUNK]), np.int64)
    call[TAKEN], call[TEAM], call[STARTED] = taken.ctypes.data, 1, 0
    if threads > 1 and matrix[GOMP] != 0 and call[LAST] > call[CHUNK]:
        call[TEAM] = threads
        _parallel(matrix[GOMP], matrix[WORKER], call.ctypes.data, threads)
    else:
        _take_chunks(call.ctypes.data)
    call[TAKEN] = 0 * taken.size  # used here: so it lives until now


def _multiply_many(
    descriptor: int, x: int, y: int, bias: int, batch: int, dtype: int, threads: int, scratch: int, room: int
) -> int:
    matrix = carray(at_int64(descriptor), MATRIX_FIELDS)
    m, n = matrix[M], matrix[N]
    count, threads = -(-batch // LANES), _worth(threads, m * n * batch)
    call = np.zeros(CALL_FIELDS, np.int64)
    if count >= threads * _PANELS_EACH:
        call[TASK], call[LAST], call[CHUNK] = BY_PANELS, count, -(-count // threads)
    else:
        call[TASK], call[LAST], call[CHUNK] = BY_LINES, m, -(-m // (threads * _LINES)) * _LINES
    words = words_of(n, dtype)
    codes = min(batch * words, _CHUNK_CODES)  # as many as inputs, which are read for each chunk
    lines = max(codes // widened_at_a_time(words, dtype) // _PANEL_LINES, 1) * _PANEL_LINES
    panels = min(max(_MOST_INPUTS // (words * LANES), WIDE), _MOST // LANES)
    call[LINES], call[PANELS] = min(lines, m), min(panels, count if call[TASK] == BY_LINES else call[CHUNK])
    call[SCRATCH_STRIDE] = scratch_bytes(matrix, dtype, call[LINES], call[PANELS])
    if LINE + threads * call[SCRATCH_STRIDE] > room:
        return LINE + threads * call[SCRATCH_STRIDE]
    call[SCRATCH] = in_lines(scratch)  # no vector lies in two lines of the caches
    call[MATRIX], call[INPUT], call[OUTPUT], call[BIAS] = descriptor, x, y, bias
    call[BATCH], call[DTYPE] = batch, dtype
    _share_out(call, matrix, threads)
    return 0 * call[TAKEN]  # used here: so it lives until now


@jit
def _fixed_point(x: Any, n: int, halved: bool, fixed: Any, digits: Any, scale: Any) -> bool:  # noqa: ANN401
    """Make one row x (n) of float32 integers, fixed (n), and cut these into planes of signed digits to the base 256.

    scale = (unit, offset's product).

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
        inputs, whole, count = x[start:], fixed[start:], min(half, n - start)
        low, middle, high = digits[3 * part], digits[3 * part + 1], digits[3 * part + 2]
        for k in range(count):
            value = np.int32(np.floor(inputs[k] * inverse + np.float32(0.5)))
            total += value
            whole[k] = value
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
    matrix = carray(at_int64(descriptor), MATRIX_FIELDS)
    kind, m, n = matrix[KIND], matrix[M], matrix[N]
    steps = carray(at_float32(matrix[STEPS]), n)
    width = (n + 1) // 2 if kind == INT4 else n
    for line in range(0, _FIRST_BYTES, 64):  # on their way while x is scaled
        _fetch(matrix[CODES] + line)
        if line < 4 * m:
            _fetch(matrix[ROWS] + line)
    call = np.zeros(CALL_FIELDS, np.int64)
    call[MATRIX], call[TASK], call[OUTPUT], call[BIAS] = descriptor, FLOATS, y, bias
    call[BATCH], call[DTYPE], call[LAST] = batch, dtype, m
    scaled = np.zeros((batch, padded(n)), np.float32)
    for b in range(batch):
        scale_row(x + b * n * entry_bytes(dtype), dtype, n, steps, scaled[b])
    scales = np.zeros((batch, 2), np.float64)
    call[SCALES] = scales.ctypes.data
    call[INPUT], call[SCALED_STRIDE] = scaled.ctypes.data, 4 * scaled.shape[1]
    if BYTE_PRODUCTS == 64:
        exact = n <= _LONGEST and (kind in (INT6, INT8) or (kind == INT4 and batch < 4))
    else:
        exact = BYTE_PRODUCTS > 0 and n <= _LONGEST and kind in (INT4, INT6) and batch < 4
    plane = (width + 63) // 64 * 64 if exact else 0
    planes = 6 if kind == INT4 else 3
    octets = np.zeros(batch * planes * plane + LINE, np.int8)
    digits = carray(at_int8(in_lines(octets.ctypes.data)), (batch, planes, plane))  # no vector lies in two lines
    fixed = np.empty((batch if exact else 0, n), np.int32)
    if exact:
        for b in range(batch):
            exact = exact and _fixed_point(scaled[b], n, kind == INT4, fixed[b], digits[b], scales[b])
    halved = kind == INT4 and not exact
    pairs = np.zeros((batch if halved else 0, 2, (width + LANES - 1) // LANES * LANES), np.float32)
    if exact:
        call[TASK], call[OPERAND], call[FIXED] = BYTES, digits.ctypes.data, fixed.ctypes.data
        call[OPERAND_STRIDE], call[PLANE], call[COUNT] = digits.shape[1] * plane, plane, plane // 64
    elif halved:
        for b in range(batch):
            for k in range(width):
                high = scaled[b, k + width] * np.float32(1 / 16) if k + width < n else np.float32(0)
                pairs[b, 0, k] = high
                pairs[b, 1, k] = (scaled[b, k] - high) * np.float32(2.0**-28)
        call[OPERAND], call[PLANE] = pairs.ctypes.data, 4 * pairs.shape[2]
        call[OPERAND_STRIDE], call[COUNT] = 8 * pairs.shape[2], pairs.shape[2] // LANES
    else:
        call[OPERAND], call[OPERAND_STRIDE] = scaled.ctypes.data, 4 * scaled.shape[1]
        call[COUNT] = scaled.shape[1] // LANES
    _run(call, matrix, batch, threads)
    used = scaled.size + octets.size + fixed.size + pairs.size + scales.size  # here: so they live until now
    return call[TAKEN] + used


def _decode(descriptor: int, ids: int, first: int, count: int, y: int, dtype: int, threads: int) -> int:
    call = np.zeros(CALL_FIELDS, np.int64)
    call[TASK], call[DTYPE], call[IDS], call[FIRST_ROW] = DECODE, dtype, ids, first
    return _fill(call, descriptor, count, y, threads)


def _round(descriptor: int, x: int, inputs: int, scaled: int, first: int, count: int, y: int, threads: int) -> int:
    call = np.zeros(CALL_FIELDS, np.int64)
    call[TASK], call[INPUT], call[COUNT], call[OPERAND], call[FIRST_ROW] = ROUND, x, inputs, scaled, first
    return _fill(call, descriptor, inputs + count, y, threads)


def _add(descriptor: int, x: int, y: int, batch: int, dtype: int, threads: int) -> int:
    matrix = carray(at_int64(descriptor), MATRIX_FIELDS)
    call = np.zeros(CALL_FIELDS, np.int64)
    call[TASK], call[INPUT], call[BATCH], call[DTYPE] = ADD, x, batch, dtype
    return _fill(call, descriptor, matrix[M], y, threads)


@jit
def _fill(call: Any, descriptor: int, count: int, y: int, threads: int) -> int:  # noqa: ANN401
    matrix = carray(at_int64(descriptor), MATRIX_FIELDS)
    call[MATRIX], call[OUTPUT], call[LAST] = descriptor, y, count
    _run(call, matrix, 1, threads)
    return call[TAKEN]


def _worker(call: int) -> None:
    _take_chunks(call)


class Kernels:
    """The compiled entry points, for calls with addresses and integers; see the module.

    Attributes:
        multiply: ``(descriptor, x, y, bias, batch, dtype, threads)``: y = x . W^T + bias, for few rows. x (batch, n)
            and y (batch, m) are contiguous, of ``dtype``; bias float32 (m), or 0.
        multiply_many: ``(descriptor, x, y, bias, batch, dtype, threads, scratch, room)``: the same for LANES rows and
            more, with ``room`` bytes at ``scratch``; ``dtype`` may be PAIRED. Where the room is too little nothing is
            done, and it answers with the bytes that it takes; else with 0.
        decode: ``(descriptor, ids, first, count, y, dtype, threads)``: y (count, n) = rows of W, with
            the int64 indices ``ids``, or from ``first`` on where that is 0.
        round: ``(descriptor, x, inputs, scaled, first, count, y, threads)``: scaled (inputs, n) = x times the steps,
            and y (count, n) = rows of codes from ``first`` on, times their factors; all bfloat16.
        add: ``(descriptor, x, y, batch, dtype, threads)``: y += x . W^T, for a matrix of no dense part; x is float32, y
            of ``dtype``.
        gomp: address of the fork of torch's OpenMP pool; 0 where torch has another: one thread works then.
        rank: address of what answers with a thread's number in it, or 0.
        worker: what the threads run.
    """

    def __init__(self) -> None:
        worker = cfunc(types.void(types.int64), cache=True)(_worker)
        self.worker: int = worker.address or 0
        self.gomp, self.rank = _openmp("GOMP_parallel"), _openmp("omp_get_thread_num")
        self._keep: list[Any] = [worker]
        self.multiply, self.multiply_many = self._entry(_multiply, 7), self._entry(_multiply_many, 9)
        self.decode = self._entry(_decode, 7)
        self.round, self.add = self._entry(_round, 8), self._entry(_add, 6)

    def _entry(self, function: Callable[..., int], arguments: int) -> Callable[..., int]:
        compiled = cfunc(types.int64(*[types.int64] * arguments), cache=True)(function)
        self._keep.append(compiled)
        return ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * arguments)(compiled.address or 0)


def _openmp(name: str) -> int:
    try:
        return ctypes.cast(getattr(ctypes.CDLL(None), name), ctypes.c_void_p).value or 0
    except (AttributeError, OSError, TypeError):  # no such function, or a system where None names no library
        return 0


def few_of(batch: int) -> int:
    """Return how many of ``batch`` rows of x, the last ones, are for :attr:`Kernels.multiply`; it is 0 or more.

    For the others, if there are any, it pays to widen codes to float32 and to lay inputs side by side.
    """
    beyond = batch % LANES
    return batch if batch < LANES else beyond if beyond <= _FEW else 0


@lru_cache(maxsize=1)
def kernels() -> Kernels | None:
    """Return the compiled kernels, or None without numba; the first use on a machine compiles them, for a while."""
    return Kernels() if HAVE_NUMBA else None

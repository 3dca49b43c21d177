"""What compiled kernels need below numba: addresses, an atomic counter, a fork to OpenMP, vectors of fixed width.

numba vectorises a loop as it sees fit, at half the width of the registers and without the byte products that some
processors have; the inner products of :mod:`sqf_kernels` are written here for LLVM instead. On processors with
narrower registers LLVM splits the vectors.

A kernel's compiled form is cached under the file that it stands in: after a change here, change ``REVISION`` in
``sqf_tiles.py``, ``sqf_calls.py``, ``sqf_panels.py`` and ``sqf_kernels.py``, or they go on with the old vectors;
likewise, after a change in one of these, in those that import it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .sqf_jit import HAVE_NUMBA

try:
    from llvmlite import binding, ir
    from numba import types
    from numba.core import cgutils, config
    from numba.extending import intrinsic
except ImportError:  # the factories below then return None, and nothing is called
    FEATURES: dict[str, bool] = {}
else:
    # What numba compiles for: NUMBA_CPU_FEATURES, such as "+avx2,-avx512f", or what this processor has.
    _given = getattr(config, "CPU_FEATURES", None)
    _named = _given if _given is not None else binding.get_host_cpu_features().flatten()
    FEATURES = {feature[1:]: feature[0] == "+" for feature in _named.split(",") if feature}

    class _BFloat16(ir.Type):
        """LLVM's type, which llvmlite does not have."""

        def __str__(self) -> str:
            return "bfloat"

        def __eq__(self, other: object) -> bool:
            return isinstance(other, _BFloat16)

        def __hash__(self) -> int:
            return hash(str(self))


NONE, INT4, INT6, INT8, INT16 = 0, 4, 6, 8, 16
"""Storage of a matrix's dense part. INT6: a byte each, as INT8, for codes of 6 bits."""
LANES = 16 if FEATURES.get("avx512f") else 8
"""Floats in a vector."""
TILE = 4 if FEATURES.get("avx512f") else 3
"""Rows of codes that are multiplied with four rows of input together: as many sums as there are registers for."""
TALL = 8
"""Rows of codes that are multiplied with one row of input together: fewer sums would wait for each other."""
PANEL, WIDE = (8, 3) if FEATURES.get("avx512f") else (6, 2)
"""Rows of floats that are multiplied with so many vectors of inputs side by side, or fewer: as many sums as there are
registers for."""
PAIRS = bool(FEATURES.get("avx512bf16") and not FEATURES.get("amx-bf16"))
"""Whether :func:`panel_dots` multiplies bfloat16, two numbers at a time; AMX, which torch uses, is the faster one."""
BYTE_TILE = TILE if FEATURES.get("avx512f") else TALL
"""Rows of codes in a tile of products of bytes."""
AHEAD = 9216
"""Bytes between the codes that are multiplied and those that are fetched: tiles of short rows are no stream that the
processor would see coming. Measured on matrices of 576 columns."""
_STAY = 0 if FEATURES.get("sse4a") and FEATURES.get("avxvnni") else 2
"""How long a line that is fetched ahead is to stay, of LLVM's 0 to 3: into the second level of caches, or, on AMD's
processors from Zen 5 on, past it, where it would take the place of what lies there between two products."""
BYTE_PRODUCTS = 64 if FEATURES.get("avx512vnni") and FEATURES.get("avx512bw") else 32 if FEATURES.get("avx2") else 0
"""Bytes that the processor multiplies at a time in :func:`byte_dots`; 0: it cannot."""
LOOKUPS = 32 if FEATURES.get("avx2") else 0
"""Bytes that the processor looks up in a table at a time in :func:`lookup`; 0: it cannot."""
WORD_LOOKUPS = 32 if FEATURES.get("avx512bw") else 0
"""Words that the processor looks up in a table of 64 at a time in :func:`lookup_words`; 0: it cannot."""
LARGEST_BYTE = 127 if BYTE_PRODUCTS == 64 else 31
"""Codes in a byte each that :func:`byte_dots` multiplies lie in [-LARGEST_BYTE, LARGEST_BYTE]: AVX2 adds up products
in 16 bits, and four of a code of 6 bits, made unsigned, with a signed byte fit."""


def address_as(name: str) -> Any:  # noqa: ANN401
    """Return a function from an address to a pointer to ``name`` (int8, float32, ...)."""
    if not HAVE_NUMBA:
        return None

    @intrinsic
    def pointer(typingctx: Any, address: Any) -> Any:  # noqa: ANN401
        result = types.CPointer(getattr(types, name))

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ANN401
            return builder.inttoptr(args[0], context.get_value_type(result))

        return result(types.int64), generate

    return pointer


def fetch() -> Any:  # noqa: ANN401
    """Return a request for the memory at an address before it is needed."""
    return _request(_fetch_ahead)


def give_up() -> Any:  # noqa: ANN401
    """Return a request to move the line at an address out of a processor's own caches, to where all find it.

    Nothing where the processor has no such instruction.
    """
    return _request(_demote)


def _request(emit: Callable[[Any, Any], None]) -> Any:  # noqa: ANN401
    """Return a function of an address whose code ``emit(builder, address)`` writes; it returns nothing."""
    if not HAVE_NUMBA:
        return None

    @intrinsic
    def request(typingctx: Any, address: Any) -> Any:  # noqa: ANN401
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ANN401
            emit(builder, args[0])
            return context.get_dummy_value()

        return types.void(types.int64), generate

    return request


def fetch_add() -> Any:  # noqa: ANN401
    """Return an atomic ``*address += amount`` that answers with the value before."""
    if not HAVE_NUMBA:
        return None

    @intrinsic
    def add(typingctx: Any, address: Any, amount: Any) -> Any:  # noqa: ANN401
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ANN401
            word = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
            return builder.atomic_rmw("add", word, args[1], "monotonic")

        return types.int64(types.int64, types.int64), generate

    return add


def parallel() -> Any:  # noqa: ANN401
    """Return a call of OpenMP's ``GOMP_parallel(function, data, threads, 0)``, all by their addresses."""
    if not HAVE_NUMBA:
        return None

    @intrinsic
    def fork(typingctx: Any, gomp: Any, function: Any, data: Any, threads: Any) -> Any:  # noqa: ANN401
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ANN401
            word, count = ir.IntType(64), ir.IntType(32)
            kind = ir.FunctionType(ir.VoidType(), [word, word, count, count])
            entry = builder.inttoptr(args[0], kind.as_pointer())
            builder.call(entry, [args[1], args[2], builder.trunc(args[3], count), count(0)])
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64, types.int64), generate

    return fork


def rank() -> Any:  # noqa: ANN401
    """Return a call of OpenMP's ``omp_get_thread_num()`` by its address."""
    if not HAVE_NUMBA:
        return None

    @intrinsic
    def number(typingctx: Any, address: Any) -> Any:  # noqa: ANN401
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ANN401
            entry = builder.inttoptr(args[0], ir.FunctionType(ir.IntType(32), []).as_pointer())
            return builder.sext(builder.call(entry, []), ir.IntType(64))

        return types.int64(types.int64), generate

    return number


def _dots(emit: Callable[..., None]) -> Any:  # noqa: ANN401
    """Return a function of seven integers whose code ``emit(builder, *args)`` writes."""
    if not HAVE_NUMBA:
        return None

    @intrinsic
    def dots(typingctx: Any, z: Any, z_stride: Any, x: Any, x_stride: Any, plane: Any, count: Any, out: Any) -> Any:  # noqa: ANN401
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ANN401
            emit(builder, *args)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), generate

    return dots


def _load(builder: Any, kind: Any, address: Any) -> Any:  # noqa: ANN401
    value = builder.load(builder.inttoptr(address, kind.as_pointer()))
    value.align = 1
    return value


def _fetch_ahead(builder: Any, address: Any) -> None:  # noqa: ANN401
    """Ask for a line of memory before it is needed. What lies there need not be ours."""
    line, flag = ir.IntType(8).as_pointer(), ir.IntType(32)
    prefetch = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(ir.VoidType(), [line, flag, flag, flag]), "llvm.prefetch.p0"
    )
    builder.call(prefetch, [builder.inttoptr(address, line), flag(0), flag(_STAY), flag(1)])


def _demote(builder: Any, address: Any) -> None:  # noqa: ANN401
    """Have a line of memory leave the processor's own caches."""
    if FEATURES.get("cldemote"):
        line = ir.IntType(8).as_pointer()
        demote = _instruction(builder, "llvm.x86.cldemote", ir.VoidType(), [line])
        builder.call(demote, [builder.inttoptr(address, line)])


def _store_sums(builder: Any, add: Any, vectors: list[Any], lanes: int, out: Any) -> None:  # noqa: ANN401
    """Store the sum over the lanes of each vector, one after another from the address ``out`` on.

    As many vectors as there are lanes are summed together: two vectors of groups of partial sums become one with
    groups twice as long, so that no shuffle's lane is idle. Writes whole vectors.
    """
    for start in range(0, len(vectors), lanes):
        level: list[Any] = vectors[start : start + lanes]
        level += [None] * (lanes - len(level))
        group = 1
        while len(level) > 1:
            level = [_joined(builder, add, level[i], level[i + 1], lanes, group) for i in range(0, len(level), 2)]
            group *= 2
        at = builder.add(out, ir.IntType(64)(4 * start))
        builder.store(level[0], builder.inttoptr(at, level[0].type.as_pointer())).align = 4


def _joined(builder: Any, add: Any, first: Any, second: Any, lanes: int, group: int) -> Any:  # noqa: ANN401
    if first is None:
        return None
    second = first if second is None else second
    kind = ir.VectorType(ir.IntType(32), lanes)
    even = [x + k for j in range(0, lanes, 2 * group) for x in (j, j + lanes) for k in range(group)]
    odd = [lane + group for lane in even]
    return add(*(builder.shuffle_vector(first, second, ir.Constant(kind, mask)) for mask in (even, odd)))


def float_dots(kind: int, rows: int, batch: int) -> Any:  # noqa: ANN401
    """Return the dot products of ``rows`` rows of codes with ``batch`` rows of floats, float32 (rows, batch).

    4-bit codes: a byte ``16 h + l`` times ``x_h / 16``, and its low half, ``byte << 28 = 2^28 l``, times
    ``(x_l - x_h / 16) / 2^28``, make ``h x_h + l x_l`` with no masking; the second factors lie ``plane`` bytes behind
    the first.
    """

    def emit(builder: Any, z: Any, z_stride: Any, x: Any, x_stride: Any, plane: Any, count: Any, out: Any) -> None:  # noqa: ANN401
        word, single = ir.IntType(64), ir.FloatType()
        floats, integers = ir.VectorType(single, LANES), ir.VectorType(ir.IntType(32), LANES)
        size = 2 if kind == INT16 else 1
        codes = ir.VectorType(ir.IntType(8 * size), LANES)
        zero = ir.Constant(floats, [0.0] * LANES)
        sums = [[cgutils.alloca_once_value(builder, zero) for _ in range(batch)] for _ in range(rows)]

        z_rows = [builder.add(z, builder.mul(z_stride, word(r))) for r in range(rows)]
        x_rows = [builder.add(x, builder.mul(x_stride, word(b))) for b in range(batch)]
        with cgutils.for_range(builder, count) as loop:
            z_at = builder.mul(loop.index, word(LANES * size))
            x_at = builder.mul(loop.index, word(LANES * 4))
            factors = [builder.sext(_load(builder, codes, builder.add(row, z_at)), integers) for row in z_rows]
            for half in range(2 if kind == INT4 else 1):
                if half:
                    x_at = builder.add(x_at, plane)
                    factors = [builder.shl(code, ir.Constant(integers, [28] * LANES)) for code in factors]
                values = [builder.sitofp(factor, floats) for factor in factors]
                for b, row in enumerate(x_rows):  # one input at a time: the sums need the other registers
                    inputs = _load(builder, floats, builder.add(row, x_at))
                    for value, cells in zip(values, sums, strict=True):
                        product = builder.fmul(value, inputs, flags=("contract",))
                        builder.store(builder.fadd(builder.load(cells[b]), product, flags=("contract",)), cells[b])
        found = [builder.load(cell) for row in sums for cell in row]
        _store_sums(builder, builder.fadd, found, LANES, out)

    return _dots(emit)


def unpack() -> Any:  # noqa: ANN401
    """Return what widens ``count`` vectors of bytes ``16 h + l`` at ``z``: l to float32 at ``x``, h at ``plane``."""

    def emit(builder: Any, z: Any, z_stride: Any, x: Any, x_stride: Any, plane: Any, count: Any, out: Any) -> None:  # noqa: ANN401
        word, floats = ir.IntType(64), ir.VectorType(ir.FloatType(), LANES)
        octets, integers = ir.VectorType(ir.IntType(8), LANES), ir.VectorType(ir.IntType(32), LANES)
        up, down = (ir.Constant(integers, [bits] * LANES) for bits in (28, 4))
        with cgutils.for_range(builder, count) as loop:
            first = builder.mul(loop.index, word(LANES))
            both = builder.sext(_load(builder, octets, builder.add(z, first)), integers)
            low = builder.ashr(builder.shl(both, up), up)
            high = builder.ashr(builder.sub(both, low), down)
            for codes, place in ((low, x), (high, plane)):
                at = builder.add(place, builder.mul(first, word(4)))
                builder.store(builder.sitofp(codes, floats), builder.inttoptr(at, floats.as_pointer())).align = 4

    return _dots(emit)


def lookup() -> Any:  # noqa: ANN401
    """Return what widens ``count`` times LOOKUPS bytes ``16 h + l`` at ``z`` to bfloat16, times the float at ``x``.

    The products of l lie at ``out``, those of h at ``plane``. There are 16 of either, so each byte is looked up, once
    for each byte of its product. Without :data:`LOOKUPS` it is empty: see :func:`byte_dots`.
    """
    if not LOOKUPS:
        return _dots(lambda builder, *args: None)

    def emit(builder: Any, z: Any, z_stride: Any, x: Any, x_stride: Any, plane: Any, count: Any, out: Any) -> None:  # noqa: ANN401
        word, octets = ir.IntType(64), ir.VectorType(ir.IntType(8), LOOKUPS)
        mask = ir.VectorType(ir.IntType(32), LOOKUPS)
        find = _instruction(builder, "llvm.x86.avx2.pshuf.b", octets, [octets, octets])
        eight, four, fifteen = (ir.Constant(octets, [value] * LOOKUPS) for value in (8, 4, 15))
        twice = ir.Constant(mask, 2 * list(range(16)))  # a table for each half of a vector
        tables = [builder.shuffle_vector(table, table, twice) for table in _tables(builder, x)]
        with cgutils.for_range(builder, count) as loop:
            first = builder.mul(loop.index, word(LOOKUPS))
            both = _load(builder, octets, builder.add(z, first))
            low, high = builder.and_(both, fifteen), builder.lshr(builder.add(both, eight), four)
            for codes, place in ((low, out), (high, plane)):
                lower, upper = (builder.call(find, [table, codes]) for table in tables)
                for start in (0, LOOKUPS // 2):
                    lanes = [k + part for k in range(start, start + LOOKUPS // 2) for part in (0, LOOKUPS)]
                    products = builder.shuffle_vector(lower, upper, ir.Constant(mask, lanes))
                    at = builder.add(place, builder.add(builder.mul(first, word(2)), word(2 * start)))
                    builder.store(products, builder.inttoptr(at, octets.as_pointer())).align = 2

    return _dots(emit)


def _tables(builder: Any, address: Any) -> list[Any]:  # noqa: ANN401
    """Return the lower and the upper bytes of the bfloat16 products of the float at an address.

    They are those with the codes 0 to 7 and -8 to -1: in the order of their four bits.
    """
    rounded, octets = _rounded_products(builder, address, [*range(8), *range(-8, 0)]), ir.IntType(8)
    return [_upper_bits(builder, rounded, shift, octets) for shift in (16, 24)]


def _rounded_products(builder: Any, address: Any, codes: list[int]) -> Any:  # noqa: ANN401
    """Return the products of codes with the float at an address; their upper halves are rounded to bfloat16."""
    floats = ir.Constant(ir.VectorType(ir.FloatType(), len(codes)), [float(code) for code in codes])
    return _rounded(builder, builder.fmul(floats, _every(builder, address, len(codes))))


def _rounded(builder: Any, floats: Any) -> Any:  # noqa: ANN401
    """Return the bits of floats whose upper halves are rounded to bfloat16, to nearest even."""
    integers = ir.VectorType(ir.IntType(32), floats.type.count)

    def every(value: int) -> Any:  # noqa: ANN401
        return ir.Constant(integers, [value] * integers.count)

    bits = builder.bitcast(floats, integers)
    odd = builder.and_(builder.lshr(bits, every(16)), every(1))
    return builder.add(bits, builder.add(odd, every(0x7FFF)))


def _upper_bits(builder: Any, words: Any, shift: int, kind: Any) -> Any:  # noqa: ANN401
    """Return the bits of 32-bit words from ``shift`` on, as many as an integer of the kind has."""
    size = words.type.count
    return builder.trunc(builder.lshr(words, ir.Constant(words.type, [shift] * size)), ir.VectorType(kind, size))


def lookup_words() -> Any:  # noqa: ANN401
    """Return what widens ``count`` times WORD_LOOKUPS codes of 6 bits at ``z``, a byte each, to bfloat16.

    Their products with the float at ``x`` lie at ``out``; there are 64. Without :data:`WORD_LOOKUPS` it is empty: see
    :func:`byte_dots`.
    """
    if not WORD_LOOKUPS:
        return _dots(lambda builder, *args: None)

    def emit(builder: Any, z: Any, z_stride: Any, x: Any, x_stride: Any, plane: Any, count: Any, out: Any) -> None:  # noqa: ANN401
        word, half = ir.IntType(64), ir.IntType(16)
        octets, words = ir.VectorType(ir.IntType(8), WORD_LOOKUPS), ir.VectorType(half, WORD_LOOKUPS)
        find = _instruction(builder, "llvm.x86.avx512.vpermi2var.hi.512", words, [words, words, words])
        codes = list(range(32)), list(range(-32, 0))  # in the order of their six bits
        lower, upper = (_upper_bits(builder, _rounded_products(builder, x, some), 16, half) for some in codes)
        with cgutils.for_range(builder, count) as loop:
            first = builder.mul(loop.index, word(WORD_LOOKUPS))
            places = builder.sext(_load(builder, octets, builder.add(z, first)), words)  # of which six bits count
            products = builder.call(find, [lower, places, upper])
            at = builder.add(out, builder.mul(first, word(2)))
            builder.store(products, builder.inttoptr(at, words.as_pointer())).align = 2

    return _dots(emit)


def side_by_side(scaled: str = "", rounded: bool = False) -> Any:  # noqa: ANN401
    """Return what fills ``out``, float32 (count x LANES, LANES), with LANES rows of floats at ``z``, transposed.

    ``plane`` bytes lie between two rows of ``out``. Before, ``columns`` are scaled by the floats at ``x``, or ``rows``
    by the floats at ``x`` and then moved by those at ``x_stride``. ``out`` is bfloat16 where it is to be ``rounded``;
    NaNs must have nothing in their lower halves then, as those from bfloat16.
    """

    def emit(builder: Any, z: Any, z_stride: Any, x: Any, x_stride: Any, plane: Any, count: Any, out: Any) -> None:  # noqa: ANN401
        word, floats = ir.IntType(64), ir.VectorType(ir.FloatType(), LANES)
        mask = ir.VectorType(ir.IntType(32), LANES)
        rows = [builder.add(z, builder.mul(z_stride, word(r))) for r in range(LANES)]
        with cgutils.for_range(builder, count) as loop:
            first = builder.mul(loop.index, word(LANES))
            at = builder.mul(first, word(4))
            block = [_load(builder, floats, builder.add(row, at)) for row in rows]
            if scaled == "columns":
                factor = _load(builder, floats, builder.add(x, at))
                block = [builder.fmul(row, factor) for row in block]
            elif scaled == "rows":
                for r, row in enumerate(block):
                    factor, offset = (_every(builder, builder.add(address, word(4 * r))) for address in (x, x_stride))
                    product = builder.fmul(row, factor, flags=("contract",))
                    block[r] = builder.fadd(product, offset, flags=("contract",))
            size = LANES // 2
            while size:  # rows r and r + size swap the blocks of that size which lie off the diagonal
                lanes = [lane for lane in range(LANES) if not lane & size]
                even = [k for lane in range(LANES) for k in [lane if not lane & size else lane - size + LANES]]
                odd = [k for lane in range(LANES) for k in [lane + size if not lane & size else lane + LANES]]
                for r in lanes:
                    one, other = block[r], block[r + size]
                    block[r] = builder.shuffle_vector(one, other, ir.Constant(mask, even))
                    block[r + size] = builder.shuffle_vector(one, other, ir.Constant(mask, odd))
                size //= 2
            for k, vector in enumerate(block):
                place = builder.add(out, builder.mul(plane, builder.add(first, word(k))))
                if rounded:
                    vector = _upper_bits(builder, _rounded(builder, vector), 16, ir.IntType(16))
                builder.store(vector, builder.inttoptr(place, vector.type.as_pointer())).align = 2 if rounded else 4

    return _dots(emit)


def _every(builder: Any, address: Any, lanes: int = LANES) -> Any:  # noqa: ANN401
    """Return a vector of the float at an address, in every lane."""
    single, mask = ir.FloatType(), ir.VectorType(ir.IntType(32), lanes)
    unknown = ir.Constant(ir.VectorType(single, lanes), ir.Undefined)
    value = builder.load(builder.inttoptr(address, single.as_pointer()))
    lane = builder.insert_element(unknown, value, ir.IntType(32)(0))
    return builder.shuffle_vector(lane, unknown, ir.Constant(mask, [0] * lanes))


def panel_dots(rows: int, vectors: int, paired: bool = False) -> Any:  # noqa: ANN401
    """Return what adds the dot products of ``rows`` rows of floats with inputs side by side to float32 ``out``.

    ``out`` is (rows, vectors x LANES). Inputs lie as (count, LANES): a number of each of LANES inputs, then the next
    ones; ``plane`` bytes behind them lie those of the next vector. So sums stay where they are added up, and nothing is
    summed over a vector in the end.

    Where they are ``paired``, two bfloat16 stand in the place of each float of rows and inputs; sums are float32 still.
    Without :data:`PAIRS` that is empty: see :func:`byte_dots`.
    """
    if paired and not PAIRS:
        return _dots(lambda builder, *args: None)

    def emit(builder: Any, z: Any, z_stride: Any, x: Any, x_stride: Any, plane: Any, count: Any, out: Any) -> None:  # noqa: ANN401
        word, floats = ir.IntType(64), ir.VectorType(ir.FloatType(), LANES)
        places = [builder.add(out, word(4 * LANES * k)) for k in range(rows * vectors)]
        cells = [cgutils.alloca_once_value(builder, _load(builder, floats, place)) for place in places]
        z_rows = [builder.add(z, builder.mul(z_stride, word(r))) for r in range(rows)]

        def added(total: Any, every: Any, vector: Any) -> Any:  # noqa: ANN401
            if not paired:
                return builder.fadd(total, builder.fmul(every, vector, flags=("contract",)), flags=("contract",))
            halves = ir.VectorType(_BFloat16(), 2 * LANES)
            product = _instruction(builder, "llvm.x86.avx512bf16.dpbf16ps.512", floats, [floats, halves, halves])
            return builder.call(product, [total, builder.bitcast(every, halves), builder.bitcast(vector, halves)])

        with cgutils.for_range(builder, count) as loop:
            x_at = builder.add(x, builder.mul(loop.index, word(4 * LANES)))
            inputs = [_load(builder, floats, builder.add(x_at, builder.mul(plane, word(v)))) for v in range(vectors)]
            z_at = builder.mul(loop.index, word(4))
            for r, row in enumerate(z_rows):
                every = _every(builder, builder.add(row, z_at))
                for vector, cell in zip(inputs, cells[r * vectors : (r + 1) * vectors], strict=True):
                    builder.store(added(builder.load(cell), every, vector), cell)
        for place, cell in zip(places, cells, strict=True):
            builder.store(builder.load(cell), builder.inttoptr(place, floats.as_pointer())).align = 4

    return _dots(emit)


def byte_dots(kind: int, rows: int, batch: int) -> Any:  # noqa: ANN401
    """Return the dot products of ``rows`` rows of codes, made unsigned, with ``batch`` rows of integers.

    Codes of 4 bits are made unsigned by 8, others by ``LARGEST_BYTE + 1``. The integers come as three planes of signed
    digits to the base 256, least first, and for 4-bit codes as three more for the columns of the high halves; ``plane``
    is the planes' distance, ``count`` their lines of 64 bytes. Results: int32 (rows, batch, digits), exact.

    Callers choose when they run, so it is compiled everywhere; without :data:`BYTE_PRODUCTS` it is empty, since LLVM
    aborts the process over an instruction that the processor does not have.
    """
    if not BYTE_PRODUCTS:
        return _dots(lambda builder, *args: None)

    def emit(builder: Any, z: Any, z_stride: Any, x: Any, x_stride: Any, plane: Any, count: Any, out: Any) -> None:  # noqa: ANN401
        word = ir.IntType(64)
        x_rows = [builder.add(x, builder.mul(x_stride, word(b))) for b in range(batch)]

        def sums_of(z_rows: list[Any]) -> list[Any]:
            return _byte_sums(builder, kind, z_rows, z_stride, x_rows, plane, count)

        if BYTE_PRODUCTS == 64:
            found = sums_of([builder.add(z, builder.mul(z_stride, word(r))) for r in range(rows)])
        else:  # too few registers for the sums of more than one row; and next to none of the processor idles for one
            kept = cgutils.alloca_once(builder, _quads(), size=word(3 * batch * rows))
            with cgutils.for_range(builder, word(rows)) as row:
                first = builder.mul(row.index, word(3 * batch))
                for k, total in enumerate(sums_of([builder.add(z, builder.mul(z_stride, row.index))])):
                    builder.store(total, builder.gep(kept, [builder.add(first, word(k))]))
            found = [builder.load(builder.gep(kept, [word(k)])) for k in range(3 * batch * rows)]
        _store_sums(builder, builder.add, found, BYTE_PRODUCTS // 4, out)

    return _dots(emit)


def _quads() -> Any:  # noqa: ANN401
    return ir.VectorType(ir.IntType(32), BYTE_PRODUCTS // 4)


def _byte_sums(
    builder: Any,  # noqa: ANN401
    kind: int,
    z_rows: list[Any],
    z_stride: Any,  # noqa: ANN401
    x_rows: list[Any],
    plane: Any,  # noqa: ANN401
    count: Any,  # noqa: ANN401
) -> list[Any]:
    """Return the sums over a row of codes, for each of ``z_rows``, of ``x_rows`` and of three digits."""
    word = ir.IntType(64)
    cells = [cgutils.alloca_once(builder, _quads()) for _ in range(3 * len(x_rows) * len(z_rows))]
    for cell in cells:
        builder.store(ir.Constant(_quads(), [0] * (BYTE_PRODUCTS // 4)), cell)
    with cgutils.for_range(builder, count) as loop:
        at = builder.mul(loop.index, word(64))
        ahead = builder.add(at, word(AHEAD))
        for row in z_rows:
            _fetch_ahead(builder, builder.add(row, ahead))
        free = iter(cells)
        for row in z_rows:
            codes = _line_of_codes(builder, kind, builder.add(row, at))
            for x_row in x_rows:
                for digit in range(3):
                    pairs = []
                    for code, first, part in codes:
                        offset = builder.add(builder.mul(plane, word(first + digit)), builder.add(at, word(part)))
                        pairs.append((code, _load(builder, code.type, builder.add(x_row, offset))))
                    cell = next(free)
                    builder.store(_add_products(builder, builder.load(cell), pairs), cell)
    return [builder.load(cell) for cell in cells]


def _line_of_codes(builder: Any, kind: int, address: Any) -> list[tuple[Any, int, int]]:  # noqa: ANN401
    """Return 64 bytes of codes, made unsigned: vectors, each with the first plane and the byte that it goes with."""
    octets = ir.VectorType(ir.IntType(8), BYTE_PRODUCTS)

    def every(byte: int) -> Any:  # noqa: ANN401
        return ir.Constant(octets, [byte] * BYTE_PRODUCTS)

    found = []
    for part in range(0, 64, BYTE_PRODUCTS):
        code = _load(builder, octets, builder.add(address, ir.IntType(64)(part)))
        if kind == INT4:
            code = builder.add(code, every(0x88))  # 16 (h + 8) + l + 8
            found.append((builder.and_(code, every(15)), 0, part))
            found.append((builder.lshr(code, every(4)), 3, part))
        else:
            found.append((builder.add(code, every(LARGEST_BYTE + 1)), 0, part))
    return found


def _add_products(builder: Any, total: Any, pairs: list[tuple[Any, Any]]) -> Any:  # noqa: ANN401
    """Return total, int32 (lanes), plus the products of unsigned with signed bytes, four neighbours to a lane.

    AVX2 has products of bytes that are added in pairs, to 16 bits; there must be room for all the ``pairs`` in them.
    """
    quads, octets = total.type, pairs[0][0].type
    if BYTE_PRODUCTS == 64:
        product = _instruction(builder, "llvm.x86.avx512.vpdpbusd.512", quads, [quads, octets, octets])
        for code, digits in pairs:
            total = builder.call(product, [total, code, digits])
        return total
    words = ir.VectorType(ir.IntType(16), 16)
    product = _instruction(builder, "llvm.x86.avx2.pmadd.ub.sw", words, [octets, octets])
    found = [builder.call(product, pair) for pair in pairs]
    added = found[0]
    for more in found[1:]:
        added = builder.add(added, more)
    wider = _instruction(builder, "llvm.x86.avx2.pmadd.wd", quads, [words, words])
    return builder.add(total, builder.call(wider, [added, ir.Constant(words, [1] * 16)]))


def _instruction(builder: Any, name: str, result: Any, arguments: list[Any]) -> Any:  # noqa: ANN401
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, arguments), name)

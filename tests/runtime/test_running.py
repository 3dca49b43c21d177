"""Every structure, laid out in every way, multiplies as its dense matrix does."""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from hf_sqf.runtime import sqf_integers, sqf_kernels, sqf_vectors
from hf_sqf.runtime.sqf_container import pack
from hf_sqf.runtime.sqf_factors import Factors, Term
from hf_sqf.runtime.sqf_integers import Integers, kind_for, store
from hf_sqf.runtime.sqf_resident import is_resident, lay_out, resident_factors, resident_matrices
from hf_sqf.runtime.sqf_running import Sum, TwoFactor
from hf_sqf.runtime.sqf_vectors import INT4, INT6, INT8, INT16, NONE

STRUCTURES = ["grid", "wide grid", "svd", "sparse_pca", "vq", "padded vq", "scaled vq", "pgd", "scaled pgd", "svd+grid"]
STRUCTURES += ["square pgd", "square pgd+grid"]
SHAPES = [(1, 1), (5, 7), (64, 96), (130, 67), (257, 320)]


def integers(generator: torch.Generator, shape: tuple[int, ...], spread: float, limit: int = 127) -> torch.Tensor:
    values = torch.randn(shape, generator=generator) * spread
    return values.round().clamp(-limit, limit).to(torch.int8 if limit < 128 else torch.int16)


def scales(generator: torch.Generator, count: int) -> torch.Tensor:
    return torch.randint(-12, 13, (count,), generator=generator, dtype=torch.int32)


def make(structure: str, shape: tuple[int, int], seed: int = 0) -> Factors:
    """Random factors of a structure."""
    g = torch.Generator().manual_seed(seed)
    m, n = shape

    def term(kind: str) -> Term:
        if kind.endswith("grid"):
            codes = integers(g, shape, 2.0)
            if kind == "wide grid":
                codes = integers(g, shape, 300.0, 30000)
            return Term(codes, -9000, scales(g, n), scales(g, m))
        width = n
        if kind in ("vq", "pgd", "scaled vq", "scaled pgd"):
            width = max(1, n // 4)
        if kind == "padded vq":
            width = max(1, (n + 2) // 3)
        blocks = math.ceil(n / width)
        count = {"svd": max(1, min(m, n) // 6), "square pgd": n}.get(kind, 16)
        atoms, steps = integers(g, (count, width), 30.0), scales(g, count) // 4
        rows = scales(g, m * blocks) if kind.startswith(("scaled", "svd")) else scales(g, 1)
        if kind.endswith("vq"):
            codes = torch.randint(0, count, (m * blocks,), generator=g)
        else:
            codes = integers(g, (m * blocks, count), 5.0)
            if kind != "svd":
                codes *= torch.rand(codes.shape, generator=g) < 0.2
        return Term(codes, -20000, steps, rows, atoms, step_resolution=1, one_hot=kind.endswith("vq"))

    return Factors(shape, structure.split()[-1], tuple(term(kind) for kind in structure.split("+")))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    expected = expected.double()
    return float((found.double() - expected).norm() / expected.norm().clamp(min=1e-30))


@pytest.fixture(params=[True, False], ids=["compiled", "torch"])
def compiled(request, monkeypatch) -> bool:
    if not request.param:
        monkeypatch.setattr(sqf_integers, "HAVE_NUMBA", False)
        monkeypatch.setattr("hf_sqf.runtime.sqf_running.HAVE_NUMBA", False)
    return request.param


@pytest.mark.parametrize("backend", ["int4", "int8"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_products_are_those_of_the_dense_matrix(structure, shape, backend, compiled):
    torch.manual_seed(0)  # outputs that nearly cancel out may be off by more
    factors = make(structure, shape)
    (matrix,) = resident_matrices(lay_out([factors], backend))
    weight = factors.dense()
    m, n = shape
    bias = torch.randn(m)
    for batch in (0, 1, 2, 3, 4, 7, 40, 63, 530):
        x = torch.randn(batch, n)
        expected = x.double() @ weight.double().T + bias.double()
        assert relative(matrix.multiply(x, bias), expected) < 1e-5
        y = torch.randn(batch, m)
        assert relative(matrix.multiply_transposed(y), y.double() @ weight.double()) < 1e-5
    assert relative(matrix.decode(0, m, torch.float32), weight) < 1e-6
    ids = torch.randint(0, m, (5,))
    assert relative(matrix.pick(ids, torch.float32), weight[ids]) < 1e-6
    assert matrix.pick(ids[:0], torch.float32).shape == (0, n)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_dtypes(structure, dtype, compiled):
    """Within the rounding of inputs and outputs of that dtype: sums are taken in float32."""
    torch.manual_seed(0)  # a single row of outputs that nearly cancel out may be off by more
    factors = make(structure, (64, 96))
    weight = factors.dense().double()
    (matrix,) = resident_matrices(lay_out([factors], "int8"))
    tolerance = {torch.bfloat16: 6e-3, torch.float16: 8e-4, torch.float64: 1e-5}[dtype]
    for batch in (1, 3, 40):
        x = torch.randn(batch, 96).to(dtype)
        y = matrix.multiply(x)
        assert y.dtype == dtype
        assert relative(y, x.double() @ weight.T) < tolerance
        assert matrix.pick(torch.arange(3), dtype).dtype == dtype


@pytest.mark.skipif(not sqf_integers.HAVE_NUMBA, reason="no compiled kernels to choose against")
@pytest.mark.parametrize("fast", [True, False])
def test_many_bfloat16_rows_are_for_torch_where_the_processor_multiplies_bfloat16(fast, monkeypatch):
    monkeypatch.setattr(sqf_integers, "_BFLOAT16_ROWS", 32 if fast else None)
    monkeypatch.setattr(sqf_integers, "PAIRS", False)
    shapes: list[tuple[int, ...]] = []
    product = torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda b, x, w: shapes.append(tuple(x.shape)) or product(b, x, w))
    (matrix,) = resident_matrices(lay_out([make("grid", (257, 320))], "int4"))
    many, bias = torch.randn(2, 16, 320), torch.randn(257)
    weight = matrix.decode(0, 257, torch.float32).double()
    for x in (many.bfloat16(), many.bfloat16()[:, :15], many):
        y = matrix.multiply(x.contiguous(), bias)
        assert y.shape == (*x.shape[:-1], 257) and y.dtype == x.dtype
        assert relative(y, x.double() @ weight.T + bias) < 6e-3
    assert shapes == ([(32, 320)] if fast else [])


@pytest.mark.skipif(not sqf_integers.HAVE_NUMBA, reason="compiled kernels")
@pytest.mark.parametrize("kind", [NONE, INT4, INT6, INT8, INT16])
@pytest.mark.parametrize("n", [1, 2, 15, 63, 64, 65, 127, 200, 1201])
def test_products_in_bfloat16_are_those_of_scaled_inputs_and_scaled_codes(kind, n, monkeypatch):
    """Each rounded to nearest once, as torch does, codes beyond the storage's range too; nothing bad is lost."""
    monkeypatch.setattr(sqf_integers, "_BFLOAT16_ROWS", 1)
    monkeypatch.setattr(sqf_integers, "PAIRS", False)
    codes = integers(torch.Generator().manual_seed(n), (301, n), 3.0, 3000)
    codes[0, 0] = codes[300, n - 1] = 2999
    matrix = Integers((301, n), kind, store(codes, kind), torch.rand(n) + 0.5, torch.rand(301) - 0.5)
    x = torch.randn(300, n).bfloat16()
    x[1, 0], x[2, n - 1] = math.inf, math.nan
    inputs, rounded = (x * matrix.steps).bfloat16(), (codes * matrix.rows[:, None]).bfloat16()
    expected = torch.mm(inputs, rounded.T)
    assert not expected[1:3].isfinite().any()
    threads = torch.get_num_threads()
    try:
        for count in (threads, 1, 5):
            torch.set_num_threads(count)
            scaled, weight = torch.empty_like(x), torch.empty((301, n), dtype=torch.bfloat16)
            kernels = sqf_kernels.kernels()
            kernels.round(
                matrix._address, x.data_ptr(), len(x), scaled.data_ptr(), 7, 294, weight[7:].data_ptr(), count
            )
            kernels.round(matrix._address, 0, 0, 0, 0, 7, weight.data_ptr(), count)
            torch.testing.assert_close(scaled, inputs, rtol=0.0, atol=0.0, equal_nan=True)
            assert torch.equal(weight, rounded)
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(matrix.multiply(x), expected, rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.skipif(not sqf_vectors.PAIRS, reason="a processor that multiplies pairs of bfloat16")
@pytest.mark.parametrize("kind", [NONE, INT4, INT6, INT8, INT16])
@pytest.mark.parametrize("shape", [(301, 1), (301, 63), (17, 64), (300, 577), (40, 2049), (33, 4100)])
@pytest.mark.parametrize("batch", [16, 17, 64, 300])
def test_products_of_pairs_are_those_of_scaled_inputs_and_codes(kind, shape, batch):
    """Inputs times steps are rounded once, as codes beyond 256 are; factors and bias come after the sum in float32."""
    m, n = shape
    generator = torch.Generator().manual_seed(n + batch)
    codes = integers(generator, (m, n), 3.0, 3000)
    if kind == NONE:
        codes *= torch.rand(m, n, generator=generator) < 0.1
    codes[0, 0] = codes[m - 1, n - 1] = 2999
    steps, rows, bias = (torch.rand(size, generator=generator) + 0.5 for size in (n, m, m))
    matrix = Integers((m, n), kind, store(codes, kind), steps, rows)
    x = torch.randn(batch, n, generator=generator).bfloat16()
    rounded = codes.bfloat16().double().T
    threads = torch.get_num_threads()
    try:
        for given in (None, bias):
            expected = ((x * steps).bfloat16().double() @ rounded) * rows + (0 if given is None else given)
            torch.set_num_threads(threads)
            y = matrix.multiply(x, given)
            assert y.dtype == torch.bfloat16
            assert relative(y, expected) < 2**-8  # of a last rounding alone
            for count in (1, 5):
                torch.set_num_threads(count)
                assert torch.equal(matrix.multiply(x, given), y)
    finally:
        torch.set_num_threads(threads)
    x[1, 0], x[2, n - 1] = math.inf, math.nan
    y = matrix.multiply(x)
    assert not y[1:3].isfinite().all(1).any() and y[2].isnan().all()
    assert torch.equal(y[3:], matrix.multiply(x.nan_to_num())[3:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bfloat16_rows", [32, None])
def test_a_part_of_few_nonzeros_is_added_to_the_others(dtype, bfloat16_rows, compiled, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(sqf_integers, "_BFLOAT16_ROWS", bfloat16_rows)
    whole, rest = make("square pgd+grid", (300, 65)).terms
    codes = torch.zeros(300, 65, dtype=torch.int16)
    codes[0, 0], codes[7, 64], codes[7, 3], codes[299, 64] = 900, -1, 30, 5
    factors = Factors((300, 65), "pgd", (whole, replace(rest, codes=codes, scale=-2000)))
    alone = Factors((300, 65), "pgd", (whole,)).dense().double()
    (matrix,) = resident_matrices(lay_out([factors], "int4"))
    assert isinstance(matrix, Sum) and [part.shape for part in matrix.parts] == 2 * [(300, 65)]
    assert bool(matrix.parts[1].integers.scattered) == compiled
    weight, bias = factors.dense().double(), torch.randn(300)
    assert relative(weight, alone) > 0.05
    for batch in (1, 3, 31, 32, 70):
        x = torch.randn(2, batch, 65).to(dtype)
        expected = x.double() @ weight.T + bias.double()
        before = x.clone()
        assert relative(matrix.multiply(x, bias), expected) < (1e-5 if dtype == torch.float32 else 6e-3)
        assert torch.equal(x, before)
        without = x.double() @ alone.T + bias.double()
        assert relative(matrix.multiply(x, bias)[..., 1:7], without[..., 1:7]) < 6e-3


@pytest.mark.parametrize("backend", ["int4", "int8"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_layout_gives_the_packed_bytes_back(structure, backend):
    stack = [make(structure, (33, 50), seed) for seed in range(3)]
    data = lay_out(stack, backend)
    assert is_resident(data) and not is_resident(pack(stack))
    assert torch.equal(pack(resident_factors(data)), pack(stack))
    with pytest.raises((ValueError, RuntimeError)):
        resident_factors(data[: data.numel() // 2])


@pytest.mark.parametrize("structure", ["svd", "pgd", "square pgd", "square pgd+grid"])
def test_no_product_of_factors_is_formed_for_a_few_rows(structure, monkeypatch):
    """As many multiplications as codes, and not as many for each atom."""
    (matrix,) = resident_matrices(lay_out([make(structure, (257, 320))], "int8"))

    def formed(*args: object) -> None:
        raise AssertionError("the product of the factors was formed")

    monkeypatch.setattr(TwoFactor, "decode", formed)
    for batch in (1, 4, 40) if structure.startswith("square") else (1, 4):
        assert matrix.multiply(torch.randn(batch, 320)).shape == (batch, 257)


def test_decoding_is_bit_for_bit_that_of_the_factors():
    for structure in ("grid", "wide grid"):
        factors = make(structure, (257, 320))
        (matrix,) = resident_matrices(lay_out([factors], "int4"))
        assert torch.equal(matrix.decode(0, 257, torch.float32), factors.dense())
        assert torch.equal(matrix.decode(0, 257, torch.bfloat16), factors.dense(torch.bfloat16))


@pytest.mark.parametrize("kind", [NONE, INT4, INT6, INT8, INT16])
@pytest.mark.parametrize("n", [1, 15, 64, 65, 200, 1201, 2304])
def test_storage(kind, n, compiled):
    """All storages hold all codes, whatever their remainder, and multiply: longer rows than DEPTH part by part."""
    codes = integers(torch.Generator().manual_seed(n), (77, n), 40.0, 3000)
    codes[:, ::3] //= 40
    codes[0, 0] = 3000
    matrix = Integers((77, n), kind, store(codes, kind), torch.rand(n) + 0.5, torch.rand(77) + 0.5)
    assert torch.equal(matrix.codes().int(), codes.int())
    expected = codes.double() * matrix.steps.double() * matrix.rows.double()[:, None]
    for batch in (1, 2, 5, 16, 21, 33, 70, 150):
        x, bias = torch.randn(batch, n), torch.randn(77) if batch % 2 else None
        y = matrix.multiply(x, bias)
        assert (y is not None) == compiled
        if y is not None:
            assert relative(y, x.double() @ expected.T + (0.0 if bias is None else bias)) < 1e-5


@pytest.mark.skipif(not sqf_kernels.HAVE_NUMBA, reason="compiled kernels")
@pytest.mark.parametrize("kind", [NONE, INT4, INT6, INT8, INT16])
def test_results_do_not_depend_on_the_number_of_threads(kind):
    codes = integers(torch.Generator().manual_seed(0), (700, 600), 3.0)
    matrix = Integers((700, 600), kind, store(codes, kind), torch.rand(600), torch.rand(700))
    threads = torch.get_num_threads()
    try:
        for batch in (1, 2, 7, 40, 300, 600):  # threads share rows of codes, or of inputs
            x, found = torch.randn(batch, 600), []
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                found.append((matrix.multiply(x), matrix.decode(0, 700, torch.float32)))
            assert all(torch.equal(y, found[0][0]) and torch.equal(w, found[0][1]) for y, w in found)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(not sqf_kernels.HAVE_NUMBA, reason="compiled kernels")
def test_threads_that_multiply_many_rows_at_a_time_do_not_share_room():
    codes = integers(torch.Generator().manual_seed(0), (300, 1200), 3.0)
    matrix = Integers((300, 1200), INT4, store(codes, INT4), torch.rand(1200), torch.rand(300))
    inputs = [torch.randn(batch, 1200) for batch in (16, 40, 150, 330, 20, 600, 48, 257)]
    expected = [matrix.multiply(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            found = list(pool.map(matrix.multiply, inputs))
            assert all(torch.equal(y, one) for y, one in zip(found, expected, strict=True))


@pytest.mark.skipif(not sqf_kernels.HAVE_NUMBA, reason="compiled kernels")
@pytest.mark.parametrize("kind", [INT4, INT6, INT8])
def test_inputs_without_a_fixed_point(kind):
    """Infinities and NaN reach the rows of output that they belong to, and no other; tiny inputs count too."""
    codes = integers(torch.Generator().manual_seed(0), (30, 50), 2.0, 7)
    matrix = Integers((30, 50), kind, store(codes, kind), torch.ones(1), torch.ones(1))
    for batch in (3, 40):
        x = torch.randn(batch, 50)
        clean = matrix.multiply(x)
        others = [b for b in range(batch) if b != 1]
        for bad in (math.inf, math.nan):
            x[1, 7] = bad
            y = matrix.multiply(x)
            assert not y[1].isfinite().any() or bad == math.inf
            assert torch.allclose(y[others], clean[others], rtol=1e-5, atol=1e-5)
            assert not y[1].isfinite().all()
    for size in (1e-30, 1e-36, 0.0):
        x = torch.randn(1, 50) * size
        assert relative(matrix.multiply(x), x.double() @ codes.double().T) < 1e-5


def test_few_codes_decide_the_storage():
    small = torch.zeros(100, 100, dtype=torch.int8).random_(-7, 8)
    assert kind_for(small, INT4, 100) == INT4
    assert kind_for(small, INT8, 100) == INT8
    small[0, :50] = 20
    assert kind_for(small, INT4, 100) == INT4
    small[:5] = 20
    assert kind_for(small, INT4, 100) == INT6
    small[:5] = 40
    assert kind_for(small, INT4, 100) == INT8
    assert kind_for(small.short() * 30, INT8, 100) == INT16
    assert kind_for(small.int() * 30000, INT8, 100) == sqf_integers.INT32
    assert kind_for(torch.eye(100).char(), INT4, 100) == NONE
    assert kind_for(torch.eye(100).char(), INT4, 1 << 17) == INT4


def test_memory_of_layouts():
    factors = make("grid", (1000, 1000))
    assert lay_out([factors], "int8").numel() < 1.01 * 1e6
    assert lay_out([factors], "int4").numel() < 0.53 * 1e6
    assert lay_out([make("vq", (1000, 1000))], "int8").numel() < 0.01 * 1e6


def test_lookup_checks_its_indices():
    for structure in ("grid", "vq", "svd"):
        (matrix,) = resident_matrices(lay_out([make(structure, (20, 30))], "int8"))
        for bad in (-1, 20):
            with pytest.raises(IndexError, match="20 rows|of 80 rows"):
                matrix.pick(torch.tensor([0, bad]), torch.float32)

"""The form: sums of codes times dictionaries, their scales, blocks and rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_sqf.runtime.sqf_factors import FINE, Factors, Term, log_scale, nearest_log_scale


def ints(*shape, low=-3, high=4, seed=0, dtype=torch.int8):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def grid(m, n, scale=-FINE):
    steps, rows = ints(n, seed=1, dtype=torch.int32), ints(m, seed=2, dtype=torch.int32)
    return Term(ints(m, n), scale, steps, rows)


def dictionary(m, atoms, width, one_hot=False):
    codes = ints(m, low=0, high=atoms) if one_hot else ints(m, atoms)
    steps = ints(atoms, seed=3, dtype=torch.int32)
    return Term(
        codes, 100, steps, torch.zeros(1, dtype=torch.int32), ints(atoms, width, seed=4), 1, 16, one_hot=one_hot
    )


def by_definition(term):
    """diag(rows) Z diag(steps) D, in float64."""
    codes = term.codes.double()
    if term.one_hot:
        codes = torch.nn.functional.one_hot(term.codes.long(), term.atom_count).double()
    steps, rows = 2.0 ** (term.steps.double() / term.step_resolution), 2.0 ** (term.rows.double() / term.row_resolution)
    atoms = torch.eye(term.width, dtype=torch.float64) if term.atoms is None else term.atoms.double()
    return 2.0 ** (term.scale / FINE) * rows[:, None] * ((codes * steps) @ atoms)


@pytest.mark.parametrize("term", [grid(5, 7), dictionary(5, 3, 7), dictionary(5, 3, 7, one_hot=True)])
def test_dense_is_the_equation(term):
    dense = Factors((5, 7), "x", (term,)).dense()
    assert dense.dtype == torch.float32
    assert torch.allclose(dense.double(), by_definition(term), rtol=1e-6)
    assert term.width == 7


def test_sum_of_terms():
    terms = grid(5, 7), dictionary(5, 3, 7)
    total = Factors((5, 7), "svd+grid", terms).dense()
    assert torch.allclose(total.double(), sum(map(by_definition, terms)), rtol=1e-5, atol=1e-6)


def test_blocks_are_cut_and_padding_falls_away():
    term = dictionary(6, 4, 3, one_hot=True)  # two rows of three blocks of three: nine columns, of which eight count
    dense = Factors((2, 8), "vq", (term,)).dense()
    assert torch.allclose(dense.double(), by_definition(term).reshape(2, 9)[:, :8], rtol=1e-6)


@pytest.mark.parametrize("term", [grid(6, 8), dictionary(18, 4, 3, True), dictionary(18, 4, 3)])
def test_rows_alone_are_the_same_bits(term):
    factors, rows = Factors((6, 8), "x", (term,)), torch.tensor([4, 0, 0, 5])
    assert torch.equal(factors.dense(rows=rows), factors.dense()[rows])
    assert torch.equal(factors.dense(torch.bfloat16, rows), factors.dense(torch.bfloat16)[rows])


def test_counts():
    term = Term(torch.tensor([[0, 1], [0, 0]], dtype=torch.int8), 0, torch.zeros(1).int(), torch.zeros(1).int())
    assert term.nonzeros == 1 and term.atom_count == 2
    assert Factors((2, 2), "grid", (term,)).sparsity == 0.75
    hot = dictionary(10, 5, 2, one_hot=True)
    assert hot.nonzeros == 10 and Factors((5, 4), "vq", (hot,)).sparsity == pytest.approx(0.8)


def test_moves():
    factors = Factors((5, 7), "x", (grid(5, 7), dictionary(5, 3, 7)))
    moved = factors.to("meta")
    assert moved.device.type == "meta" and moved.terms[1].atoms.device.type == "meta"


@given(q=st.integers(-40 * FINE, 40 * FINE), resolution=st.sampled_from([1, 16, FINE]))
@settings(max_examples=60, deadline=None)
def test_scales_on_a_logarithmic_grid(q, resolution):
    q = q * resolution // FINE
    value = log_scale(torch.tensor(q), resolution)
    assert float(value) == pytest.approx(2.0 ** (q / resolution), rel=1e-7)
    assert int(nearest_log_scale(value, resolution)) == q


def test_powers_of_two_are_exact_and_order_free():
    term = dictionary(50, 40, 6)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    shuffled = Term(term.codes[:, order], 100, term.steps[order], term.rows, term.atoms[order], 1, 16)
    assert torch.equal(term.dense(), shuffled.dense())

"""Threads: as many as torch may use and no more, and the same bytes with any number."""

import threading
import time
from pathlib import Path

import numba.np.ufunc.parallel as numba_parallel
import pytest
import torch

import hf_sqf
from hf_sqf import SQFConfig, compress
from hf_sqf.compress import job as job_module
from hf_sqf.compress.metric import Metric
from hf_sqf.compress.threads import one_thread, side_by_side
from tests.conftest import build


@pytest.fixture(params=[1, 2, 4])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def expected():
    return {}


def same_for_all(expected: dict, key: str, found: object) -> None:
    """Compare with what the first number of threads has made."""
    assert expected.setdefault(key, found) == found


@pytest.mark.parametrize("options", [{}, {"structure": "grid", "trellis": None}, {"structure": "svd+grid"}])
def test_bytes_of_a_model_do_not_depend_on_the_number(threads, expected, options):
    data = [{"input_ids": torch.randint(128, (1, 16), generator=torch.Generator().manual_seed(i))} for i in range(3)]
    model = compress(build("llama"), SQFConfig(bits=3.0, dataset=data, **options))
    packed = {name: p.numpy().tobytes() for name, p in model.named_parameters() if p.dtype == torch.uint8}
    assert len(packed) == 16
    same_for_all(expected, str(options), packed)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("structure", ["grid", "pgd", "svd"])
@pytest.mark.parametrize("trellis", [0, 4])
def test_bytes_of_a_large_weight_do_not_depend_on_the_number(threads, expected, structure, trellis):
    """Large enough for torch to share out a single sum or product, and for several chunks of rows."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(6000, 200, generator=draw) @ torch.randn(200, 200, generator=draw)
    x = torch.randn(400, 200, generator=draw) * torch.linspace(0.1, 3, 200)
    for name, metric in {
        "plain": None,
        "data": Metric((x.T @ x).double(), torch.rand(6000, generator=draw) + 0.1),
    }.items():
        step = 0.5 if metric is None else 2e3
        found = solve_side_by_side(weight, metric, step, structure, trellis)
        same_for_all(expected, f"{name} {structure} {trellis}", found)


def solve_side_by_side(weight, metric, step, structure, trellis) -> bytes:
    from hf_sqf.compress.factorize import solve
    from hf_sqf.runtime.sqf_container import pack

    (found,) = side_by_side(lambda w: solve(w, metric, step, structure, trellis=trellis), [weight])
    return pack([found.factors]).numpy().tobytes()


@pytest.fixture
def at_work(monkeypatch):
    """Sizes of the weights that are solved at the time, each time that another one begins."""
    solve, lock, running, seen = job_module.solve, threading.Lock(), [], []

    def watched(weight, *args, **options):
        with lock:
            running.append(weight.numel())
            seen.append(list(running))
        assert torch.get_num_threads() == 1
        time.sleep(0.01)
        try:
            return solve(weight, *args, **options)
        finally:
            with lock:
                running.remove(weight.numel())

    monkeypatch.setattr(job_module, "solve", watched)
    return seen


def test_weights_are_solved_by_as_many_threads_as_torch_may_use(threads, at_work):
    """Each of which has torch compute on one; numba starts none of its own."""
    compress(build("llama"), SQFConfig(structure="grid", trellis=None))
    assert max(map(len, at_work)) == threads and torch.get_num_threads() == threads
    assert not numba_parallel._is_initialized
    for source in Path(hf_sqf.__file__).parent.rglob("*.py"):
        assert "prange" not in source.read_text() and "parallel=True" not in source.read_text(), source


def test_large_weights_are_solved_together_up_to_the_size_of_the_largest(threads, at_work, monkeypatch):
    monkeypatch.setattr(job_module, "_ROOM", 1)
    model = build("llama")
    largest = max(parameter.numel() for parameter in model.parameters())
    compress(model, SQFConfig(structure="grid", trellis=None))
    assert max(map(sum, at_work)) == largest


def test_no_more_run_at_a_time_than_there_is_room_for(threads):
    lock, running, sums = threading.Lock(), [], []

    def work(size: int) -> int:
        with lock:
            running.append(size)
            sums.append(sum(running))
        time.sleep(0.01)
        with lock:
            running.remove(size)
        return -size

    sizes = [5, 3, 2, 4, 1, 1]
    assert side_by_side(work, sizes, sizes, room=9.0) == [-size for size in sizes]
    assert max(sums) <= 9
    assert threads == 1 or max(sums) > 5


@pytest.mark.parametrize("threads", [4], indirect=True)
def test_parts_of_parts_share_what_is_left(threads):
    inner = side_by_side(lambda _: len(set(side_by_side(_thread, range(40)))), range(2))
    assert inner == [2, 2]
    assert side_by_side(lambda _: len(set(side_by_side(_thread, range(40)))), range(1)) == [threads]
    assert torch.get_num_threads() == threads


def _thread(_: int) -> int:
    time.sleep(0.01)
    return threading.get_ident()


def test_an_error_is_raised_and_what_has_not_begun_does_not_begin(threads):
    begun = []

    def work(item: int) -> None:
        begun.append(item)
        time.sleep(0.02)
        raise OSError(f"item {item}")

    with pytest.raises(OSError, match="item 0"):
        side_by_side(work, range(20))
    assert len(begun) < 20 and torch.get_num_threads() == threads


def test_one_thread(threads):
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == threads

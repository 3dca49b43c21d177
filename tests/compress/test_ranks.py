"""Several processes: real ones, started by torchrun, against what one process makes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from hf_sqf import SQFConfig, compress, compress_checkpoint
from hf_sqf.compress.collect import collect
from hf_sqf.compress.ranks import Ranks
from hf_sqf.compress.sums import GROUPS, groups
from hf_sqf.compress.targets import find_targets
from tests.conftest import build

GRID = {"bits": 4.0, "structure": "grid", "trellis": None}


def data() -> list[dict[str, torch.Tensor]]:
    return [
        {"input_ids": torch.randint(128, (1, 16), generator=torch.Generator().manual_seed(seed))} for seed in range(13)
    ]


def make_everything(source: Path, out: Path) -> None:
    """Compress in all ways; what ranks and a process alone both run. Each rank saves what it has."""
    ways = {
        "in_memory": lambda: compress(build("llama"), SQFConfig(bits=3.0, overrides={"mlp": {"bits": 5}})),
        "on_load": lambda: AutoModelForCausalLM.from_pretrained(source, quantization_config=SQFConfig(**GRID)),
        "calibrated": lambda: compress(build("llama_tied"), SQFConfig(**GRID, dataset=data())),
        "experts": lambda: compress(build("mixtral"), SQFConfig(**GRID, dataset=data())),
    }
    out.mkdir()
    for name, way in ways.items():
        model = way()
        save_file(dict(model.named_parameters()), out / f"{name}.safetensors")
        coverage = model.config.quantization_config.coverage
        (out / f"{name}.json").write_text(json.dumps(coverage))
    model.save_pretrained(out.parent / "saved")  # on all ranks, of which the first one writes
    model = build("llama")
    found = collect(model, find_targets(model, SQFConfig())[0], data()[:9], data()[9:], memory=9000)
    save_file(
        {**found.moments, **{f"{name} g": g for name, g in found.energies.items()}}, out / "statistics.safetensors"
    )
    chosen = [found.inputs, found.shrinkage, found.scales, found.typical, found.tokens]
    (out / "statistics.json").write_text(json.dumps(chosen))
    compress_checkpoint(source, out.parent / "checkpoint" / "small", SQFConfig(**GRID))


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def weights_of(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in bytes_of(folder).items() if name.endswith(".safetensors")}


def torchrun(size: int, out: Path, task: str, *args: Path) -> tuple[int, list[str], float]:
    """Run a task of this file on ranks; return the exit code, what each rank wrote, and the seconds it took."""
    logs = out / "logs"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}",
               f"--log-dir={logs}", "--redirects=3", __file__, task, *map(str, args)]  # fmt: skip
    root = Path(__file__).parents[2]
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    began = time.monotonic()
    process = subprocess.Popen(
        command,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        code = process.wait(timeout=300)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    said = [next(logs.rglob(f"{rank}/stderr.log")).read_text() for rank in range(size)]
    return code, said, time.monotonic() - began


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process makes."""
    folder = tmp_path_factory.mktemp("alone")
    build("llama").save_pretrained(folder / "source", max_shard_size="20KB")
    (folder / "checkpoint").mkdir()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as torchrun has it: running the model may give other bits with more
    try:
        make_everything(folder / "source", folder / "rank-0")
    finally:
        torch.set_num_threads(threads)
    return folder


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)])
def test_bytes_do_not_depend_on_the_number_of_ranks(alone, tmp_path, size):
    (tmp_path / "checkpoint").mkdir()
    code, said, _ = torchrun(size, tmp_path, "everything", alone / "source", tmp_path)
    assert code == 0, said
    expected = bytes_of(alone / "rank-0")
    assert set(expected) > {"statistics.safetensors", "calibrated.safetensors", "experts.json"}
    for rank in range(size):
        found = bytes_of(tmp_path / f"rank-{rank}")
        assert [name for name in expected if found.get(name) != expected[name]] == []
    assert [file.name for file in (tmp_path / "checkpoint").iterdir()] == ["small"]
    assert bytes_of(tmp_path / "checkpoint") == bytes_of(alone / "checkpoint")
    assert bytes_of(tmp_path / "saved") == bytes_of(alone / "saved")
    assert [text.count("Compressing weights:") > 0 for text in said] == [True] + [False] * (size - 1)


def test_a_rank_that_raises_stops_all_with_its_reason(alone, tmp_path):
    code, said, _ = torchrun(2, tmp_path, "raising", alone / "source", tmp_path / "small")
    assert code == 1
    assert "OSError: [Errno 28] No space left on device" in said[1]  # where it was raised: the error itself
    for text in said:
        assert "rank 1 stopped at model.layers." in text and "weight: OSError: [Errno 28] No space left" in text
    seconds = [float(text.partition("stopped after ")[2].split()[0]) for text in said]
    assert max(seconds) < 5.0
    assert not (tmp_path / "small").exists()
    resumed = compress_checkpoint(alone / "source", tmp_path / "small", SQFConfig(**GRID))
    assert bytes_of(resumed) == bytes_of(alone / "checkpoint" / "small")


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="kills a process")
def test_a_rank_that_is_killed_stops_all_and_a_later_run_goes_on(alone, tmp_path):
    code, said, _ = torchrun(2, tmp_path, "killed", alone / "source", tmp_path / "small")
    assert code != 0 and not (tmp_path / "small").exists(), said
    kept = list((tmp_path / ".small.partial").glob("*.sqf"))
    assert len(kept) >= 3
    target = compress_checkpoint(alone / "source", tmp_path / "small", SQFConfig(**GRID))
    assert bytes_of(target) == bytes_of(alone / "checkpoint" / "small")
    assert not (tmp_path / ".small.partial").exists()


@pytest.mark.slow
def test_the_command_line(alone, tmp_path):
    """Two ranks of ``hf-sqf compress``; one line of output, and the same bytes."""
    code, said, _ = torchrun(2, tmp_path, "command", alone / "source", tmp_path / "small")
    assert code == 0, said
    assert weights_of(tmp_path / "small") == weights_of(alone / "checkpoint" / "small")
    out = [next((tmp_path / "logs").rglob(f"{rank}/stdout.log")).read_text() for rank in range(2)]
    assert "bits per compressed weight" in out[0] and out[1] == ""


@pytest.mark.slow
def test_ranks_must_ask_for_the_same_and_all_come(alone, tmp_path):
    code, said, _ = torchrun(2, tmp_path, "differing", alone / "source", tmp_path / "small")
    assert code == 0, said
    for text in said:
        assert "the config: rank 1 has another than rank 0" in text
    assert "rank 0 waits for the others: under torch.distributed all 2 ranks must call compress" in said[0]


@pytest.mark.slow
def test_a_rank_that_compresses_alone_does_not_wait_for_ever(alone, tmp_path):
    code, said, _ = torchrun(2, tmp_path, "alone", alone / "source", tmp_path / "small")
    assert code == 0, said
    assert "refused: rank 0 waits for the others: under torch.distributed all 2 ranks must call compress" in said[0]


def test_work_is_shared_out_by_cost():
    assert Ranks(0, 2).owners([1, 5, 3, 3, 4]) == [1, 0, 1, 0, 1]
    assert Ranks(0, 1).owners([1, 2]) == [0, 0]
    assert Ranks(0, 3).owners([]) == []


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 56])
def test_groups_are_all_items_in_order(count):
    cut = groups(range(count))
    assert [item for part in cut for item in part] == list(range(count))
    assert len(cut) == min(count, GROUPS) and max(map(len, cut)) - min(map(len, cut)) <= 1


def test_without_a_process_group_there_is_one_rank():
    ranks = Ranks.here()
    assert (ranks.rank, ranks.size, ranks.first) == (0, 1, True)
    assert ranks.gather(lambda: 3) == [3] and ranks.together(lambda: 4) == 4
    with pytest.raises(ZeroDivisionError):
        ranks.share_out([1, 0], [1, 1], lambda n: 1 / n, str)


def _failing_at(fifth, fail):
    """Have the second rank fail at its fifth weight."""
    from hf_sqf.compress import job as job_module

    solve, solved = job_module.solve, []

    def failing(weight, *args, **options):
        solved.append(1)
        if len(solved) == fifth:
            fail()
        return solve(weight, *args, **options)

    job_module.solve = failing


def main() -> None:
    """Run the task of the command line on this rank."""
    from datetime import timedelta

    import torch.distributed as dist

    from hf_sqf.compress import ranks as ranks_module

    task, source, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    if task == "command":
        from hf_sqf_command import app

        app(["compress", str(source), str(out), "--bits", "4", "--structure", "grid", "--no-trellis"])
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = dist.get_rank()
    if task == "everything":
        make_everything(source, out / f"rank-{rank}")
        dist.destroy_process_group()
        return
    if task == "differing":
        ranks_module._SILENCE = 0.1
        time.sleep(rank)
        try:
            compress(build("llama"), SQFConfig(**GRID | {"bits": 4.0 + rank}))
        except ValueError as error:
            sys.stderr.write(f"{error}\n")
        dist.destroy_process_group()
        return

    if task == "alone":
        ranks_module._COMING = timedelta(seconds=2)
        if rank == 0:
            try:
                compress(build("llama"), SQFConfig(**GRID))
            except RuntimeError as error:
                sys.stderr.write(f"refused: {error}\n")
            (out.parent / "refused").touch()
        while not (out.parent / "refused").exists():
            time.sleep(0.1)
        return

    def no_room() -> None:
        raise OSError(28, "No space left on device")

    if rank == 1:
        # Of 16 weights, eight are sampled by each rank first, and then solved.
        _failing_at(12, no_room if task == "raising" else lambda: os.kill(os.getpid(), signal.SIGKILL))
    began = time.monotonic()
    try:
        compress_checkpoint(source, out, SQFConfig(**GRID))
    finally:
        sys.stderr.write(f"stopped after {time.monotonic() - began:.1f} seconds\n")


if __name__ == "__main__":
    main()

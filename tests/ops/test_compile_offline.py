"""Every Triton kernel in every form that a model launches compiles for every target, without a spill."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

ROOT = Path(__file__).parents[2]
# Blocks of 48 KiB run everywhere; more has to be asked for, up to the card's limit.
SHARED_MEMORY = 48 * 1024
LARGEST_SHARED_MEMORY = {"80": 163 * 1024, "90": 227 * 1024, "100": 227 * 1024}


@pytest.fixture(scope="module")
def resources(tmp_path_factory):
    """In a process of its own: under Triton's interpreter there is nothing to compile."""
    path = tmp_path_factory.mktemp("kernels") / "resources.csv"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "kernels"), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "benchmarks.compile_kernels", str(path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with path.open() as file:
        return list(csv.DictReader(file))


def test_every_kernel_was_compiled_for_every_target(resources):
    kernels = {row["kernel"] for row in resources}
    assert kernels == {
        "_norm_modulate_kernel",
        "_residual_gate_kernel",
        "_qk_norm_rope_kernel",
        "_moments_kernel",
        "_combine_guidance_kernel",
        "_attention_kernel",
    }
    for kernel in kernels:
        assert {row["target"] for row in resources if row["kernel"] == kernel} == {"80", "90", "100"}


def test_nothing_spills(resources):
    assert [row for row in resources if int(row["stack"]) > 0] == []


def test_shared_memory_is_within_the_limit(resources):
    for row in resources:
        limit = LARGEST_SHARED_MEMORY[row["target"]] if row["kernel"] == "_attention_kernel" else SHARED_MEMORY
        assert int(row["shared"]) <= limit, row


def test_attention_runs_on_the_tensor_cores_of_each_target(resources):
    """Hopper's and Blackwell's own instructions, not the mma.sync that they run, too."""
    instruction = {"80": "mma.sync", "90": "wgmma", "100": "tcgen05.mma"}
    rows = [row for row in resources if row["kernel"] == "_attention_kernel"]
    assert {(row["target"], row["matrix"]) for row in rows} == set(instruction.items())


def test_tensors_are_read_and_written_in_16_bytes(resources):
    """Every access: runtime strides keep the alignment that the kernels were promised. Beside them scalars are read."""
    scalars = {
        "_moments_kernel": {"32"},
        "_combine_guidance_kernel": {"32"},
        "_residual_gate_kernel": {"64", "8"},
        "_attention_kernel": {"32"},
    }
    for row in resources:  # scales and sums, row_map and pass_through
        vectors = set() if "tma-" in row["form"] else {"128"}  # descriptors are no accesses of a thread
        assert set(row["vectors"].split()) == vectors, row
        assert set(row["scalars"].split()) <= scalars.get(row["kernel"], {"64"}), row

import os

import offline  # before anything of Hugging Face: they read the environment on import
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels on CPU tensors; read when triton is imported, which diffusers may do
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with a fixed workspace


def pytest_configure(config):
    offline.block_network()
    torch.set_num_threads(1)  # models here are tiny: more threads only wait for each other


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def deterministic():
    """Same seed for every test; nondeterministic kernels raise, and memory from `torch.empty` holds NaN."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)

"""Without a GPU the kernels run in Triton's interpreter, which is chosen when a kernel is decorated: before imports."""

import os

import hypothesis
import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"
# Fresh examples on every run; no deadline, because the first call of an operator or a kernel compiles.
hypothesis.settings.register_profile("napo", deadline=None, print_blob=True)
hypothesis.settings.load_profile("napo")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_collection_modifyitems(items):
    if GPU:
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA or ROCm GPU; torch.cuda.is_available() is False"))


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if GPU else "cpu")


@pytest.fixture(scope="session")
def ranks():
    from ranks import Ranks

    found = Ranks()
    yield found
    found.stop()

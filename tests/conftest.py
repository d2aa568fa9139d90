"""Without a GPU the kernels run in Triton's interpreter, which is chosen when a kernel is decorated: before imports."""

import os
from importlib.util import find_spec

import hypothesis
import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"
# Fresh examples on every run, and no clock: the first call of an operator compiles, and the machine may be busy.
for _name, _examples in {"all": 60, "quick": 25}.items():
    hypothesis.settings.register_profile(
        _name, max_examples=_examples, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow],
        print_blob=True,
    )  # fmt: skip
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


collect_ignore_glob = ["trainer_recipes/*"]  # for the environments of these trainers


def pytest_configure(config):
    check_interpreter()
    hypothesis.settings.load_profile("quick" if config.option.markexpr == "not slow" else "all")


def pytest_collection_modifyitems(items):
    for item in items:
        for pool in {"ranks", "two_ranks"} & {*getattr(item, "fixturenames", ())}:
            item.add_marker(pytest.mark.xdist_group(pool))  # one worker starts these processes, not each
        if "gpu" in item.keywords and not GPU:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA or ROCm GPU; torch.cuda.is_available() is False"))


def check_interpreter():
    """Up to 3.6, Triton's interpreter makes Python numbers of numpy arrays as numpy 2.4 no longer does."""
    if GPU or find_spec("triton") is None:
        return
    import numpy
    import triton

    found = triton.__version__, numpy.__version__
    of_triton, of_numpy = ([int(n) for n in version.split(".")[:2]] for version in found)
    if of_triton < [3, 7] and of_numpy >= [2, 4]:
        raise pytest.UsageError(
            f"the kernels cannot be interpreted by Triton {found[0]} with numpy {found[1]}: pip install 'numpy<2.4'"
        )


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if GPU else "cpu")


@pytest.fixture(scope="session")
def ranks():
    from ranks import Ranks

    found = Ranks()
    yield found
    found.stop()

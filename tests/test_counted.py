"""What a training step costs beside its kernels, counted: compilations of varied batches, calls of PyTorch."""

import json
import sys

import pytest

import counted
import processes


@pytest.fixture(scope="module")
def found():
    done = processes.run([sys.executable, counted.__file__], TRITON_INTERPRET=None)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("V", [128256, 50257])
def test_varied_batches_compile_few_kernels(found, V):
    """Of any length and number: what varies is an argument of a kernel, and not compiled into it."""
    compilations = found[f"compilations {V}"]
    assert set(compilations) == {
        "logps_forward_kernel", "logps_reduce_kernel", "logps_backward_kernel", "linear_rows_kernel",
        "linear_block_kernel", "objective_kernel",
    }  # fmt: skip
    assert sum(compilations.values()) <= 12, compilations


def test_a_step_goes_around_the_dispatcher_and_allocates_little(found):
    operators = found["operators"]
    assert not [name for name in operators if name.startswith("napo_loss::")]
    assert {"sequence_logps", "objective", "sequence_logpsBackward", "objectiveBackward"} <= set(operators)
    # Three for each kernel of the forward pass, four for the objective, dlogits, and autograd's first gradient.
    assert operators["aten::empty"] + operators["aten::empty_like"] <= 12, operators

"""The benchmark compares like with like: every provider that runs here gives the same loss and gradients."""

import os

import pytest
import torch

from benchmarks.linear import _row, table
from benchmarks.linear_providers import PROVIDERS, inputs
from benchmarks.measure import DEVICE, extra_bytes

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


@pytest.mark.filterwarnings("ignore")  # of the peers
@pytest.mark.parametrize("name", PROVIDERS)
def test_providers_agree(name):
    hidden, weight, labels = inputs((4, 9, 16, 50), 0.5, torch.float32)
    results = []
    for provider in ("eager", name):
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        try:
            loss, sums = PROVIDERS[provider](x, w, labels)
        except (ImportError, AttributeError, RuntimeError) as error:  # not installed, too old a torch, needs a GPU
            pytest.skip(f"{type(error).__name__}: {error}")
        loss.backward()
        results.append((loss.detach(), sums.detach(), x.grad, w.grad))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="reads the peak memory from Linux's /proc")
def test_extra_memory_is_what_a_step_takes_beyond_what_it_leaves():
    held = []

    def step():
        torch.ones(10 * 2**20, device=DEVICE).sum()  # 40 MiB
        held.append(torch.ones(2**20, device=DEVICE))

    step()
    found = extra_bytes(step, lambda: held[-1].nbytes) / 2**20
    assert 35 < found < 50


def test_a_provider_without_times_is_a_note_below_the_table():
    rows = [_row("accuracy", (1, 1, 1, 1), torch.bfloat16, 1.0, "trained", name) for name in PROVIDERS]
    from benchmarks.linear import SHAPES

    name, sizes = next(iter(SHAPES.items()))
    for provider in PROVIDERS:
        row = _row(name, sizes, torch.float32, 0.1, "trained", provider)
        rows.append(row | ({"note": "no such thing"} if provider == "CCE" else {"p50_ms": "1.0", "extra_bytes": 2**20}))
    text = table(rows)
    assert "CCE: no such thing." in text
    assert "| napo_loss |  | 1.0 ms, 1 MiB |" in text

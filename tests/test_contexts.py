"""The same numbers whatever PyTorch is set to, in whichever thread or process: contexts that a caller may be in."""

import contextlib
import os
import threading
import warnings

import pytest
import torch
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

from interrupted import assert_equal, global_state
from napo_loss import (
    LowRank,
    Moments,
    Negative,
    Recipe,
    SequenceLogps,
    fused_head,
    likely_swapped,
    linear_sequence_logps,
    margin_moments,
    napo_loss,
    noise_aware_dpo_loss,
    noise_level,
    sequence_logps,
)
from napo_loss.objective import loss as objective_loss

N, T, D, V = 4, 7, 6, 33
LABELS = torch.arange(N * T).view(N, T) % V
LABELS[1, :3] = -100
REFERENCE = torch.linspace(-30.0, -20.0, N)


def inputs(seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = {"logits": (N, T, V), "hidden": (N, T, D), "weight": (V, D), "bias": (V,), "A": (2, D), "B": (V, 2)}
    return {name: torch.randn(shape, generator=g).requires_grad_() for name, shape in shapes.items()}


def of_logits(x):
    return sequence_logps(x["logits"], LABELS)


def of_hidden(x):
    options = {"softcap": 3.0, "logits_budget": 9 * V * 4, "token_statistics": True}
    return linear_sequence_logps(
        x["hidden"], LowRank(x["weight"], x["A"], x["B"], 0.5), LABELS, bias=x["bias"], **options
    )


def packed(x):
    offsets = torch.arange(0, N * T + 1, T, device=LABELS.device)
    return sequence_logps(x["logits"].flatten(0, 1), LABELS.flatten(), cu_seqlens=offsets)


WAYS = {"logits": of_logits, "hidden": of_hidden, "packed": packed}
RECIPE = Recipe({"rejected": Negative(alpha=0.5, margin="mean"), "image_only": Negative(q=0.2)}, sft_weight=0.1)


def loss(logps: SequenceLogps):
    chosen, rejected = logps.pairs()
    ours = {"rejected": rejected, "image_only": SequenceLogps(rejected.sum - 1, rejected.length)}
    theirs = {"rejected": REFERENCE[2:], "image_only": REFERENCE[2:] - 2}
    return napo_loss(chosen, ours, REFERENCE[:2], theirs, recipe=RECIPE)


def forward(way, x):
    logps = WAYS[way](x)
    out = loss(logps)
    return [logps.sum, logps.length, out.losses, out.chosen_rewards, out.rejected_rewards, out.q, out.weights]


def step(way, x):
    found = forward(way, x)
    grads = torch.autograd.grad(found[2].sum(), list(x.values()), allow_unused=True)
    return [t.detach() for t in found] + [g for g in grads if g is not None]


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def deterministic():
    """Fills what is not written with NaN, so that nothing reads it."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


CONTEXTS = {
    "float64 by default": lambda: default_dtype(torch.float64),
    "bfloat16 by default": lambda: default_dtype(torch.bfloat16),
    "meta by default": lambda: torch.device("meta"),
    "cpu by default": lambda: torch.device("cpu"),
    "deterministic": deterministic,
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True),
    "saved on the cpu": save_on_cpu,
    "saved as copies": lambda: saved_tensors_hooks(torch.clone, torch.clone),
    "inference": torch.inference_mode,
    "no grad": torch.no_grad,
}


@pytest.mark.parametrize("name", CONTEXTS)
@pytest.mark.parametrize("way", WAYS)
def test_the_same_numbers_in_every_context(way, name):
    run = forward if name in ("inference", "no grad") else step
    expected, x, before, states = run(way, inputs()), inputs(), global_state(), []
    for _ in range(2):  # the first may load modules, which have warning filters of their own
        with CONTEXTS[name]():
            found = run(way, x)
        assert_equal(found, expected, name)
        states.append(global_state())
    assert {**states[0], "warnings": None} == {**before, "warnings": None}
    assert states[1] == states[0]


@pytest.mark.parametrize("way", WAYS)
def test_backward_outside_the_context_of_forward(way):
    """And a reference from inference mode, whose tensors autograd may not save."""
    expected, x = step(way, inputs()), inputs()
    with default_dtype(torch.bfloat16):
        found = WAYS[way](x)
    with torch.inference_mode():
        reference = [t.sum for t in WAYS[way](inputs(1)).pairs()]
    policy = [t.sum for t in found.pairs()]
    assert napo_loss(*policy, *reference).losses.requires_grad
    grads = torch.autograd.grad(loss(found).losses.sum(), list(x.values()), allow_unused=True)
    assert_equal([g for g in grads if g is not None], expected[7:], way)


def test_a_model_that_was_met_in_inference_mode_trains():
    pytest.importorskip("datasets", reason="the trl extra is not installed")
    import tiny

    ids = torch.randint(4, 20, (2, 8), generator=torch.Generator().manual_seed(0))

    def train(model):
        with fused_head(model):
            total = model(input_ids=ids, labels=ids).sum
        total.sum().backward()
        return [total.detach(), *(p.grad for p in model.parameters())]

    fresh, met = tiny.llama(), tiny.llama()
    with torch.inference_mode(), fused_head(met):
        met(input_ids=ids, labels=ids)
    assert_equal(train(met), train(fresh), "inference mode before")


@pytest.mark.parametrize("way", WAYS)
def test_four_threads_at_once(way):
    expected = [step(way, inputs(seed)) for seed in range(4)]
    barrier, found = threading.Barrier(4), [[] for _ in range(4)]

    def work(seed):
        x = inputs(seed)
        barrier.wait()
        found[seed] += [step(way, x) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(4):
        assert len(found[seed]) == 5
        for again in found[seed]:
            assert_equal(again, expected[seed], seed)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no os.fork")
@pytest.mark.parametrize("way", WAYS)
def test_a_forked_process(way):
    """As a DataLoader's workers are. Backward is PyTorch's to refuse, where the parent has run one."""
    x = inputs()
    expected = step(way, x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, from Python 3.12 on
        child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)  # those of the parent are not here
            with torch.no_grad():
                assert_equal(forward(way, x), expected[:7], way)
            try:
                found = step(way, x)
            except RuntimeError as error:
                code = 0 if "fork-based" in str(error) else 2
            else:
                assert_equal(found, expected, way)
                code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert_equal(step(way, x), expected, way)


class Exported(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


PAIRS = torch.linspace(-40.0, -30.0, 5), torch.linspace(-35.0, -45.0, 5)
LOGPS = (*PAIRS, PAIRS[0] - 1, PAIRS[1] + 1)
EXPORTS = {
    "sequence_logps": (lambda x: sequence_logps(x, LABELS)[:2], lambda: (inputs()["logits"].detach(),)),
    "linear_sequence_logps": (
        lambda h, w: linear_sequence_logps(h, w, LABELS, softcap=2.0)[:2],
        lambda: (inputs()["hidden"].detach(), inputs()["weight"].detach()),
    ),
    "LowRank": (
        lambda h, w, a, b: linear_sequence_logps(h, LowRank(w, a, b, 0.5), LABELS, token_statistics=True)[:3],
        lambda: tuple(inputs()[name].detach() for name in ("hidden", "weight", "A", "B")),
    ),
    "napo_loss": (lambda *logps: tuple(napo_loss(*logps)), lambda: LOGPS),
    "noise_aware_dpo_loss": (lambda *logps: tuple(noise_aware_dpo_loss(*logps, q=0.3)), lambda: LOGPS),
    "noise_level": (lambda a, b: noise_level(a - b), lambda: PAIRS),
    "margin_moments": (lambda a, b: tuple(margin_moments(a - b)), lambda: PAIRS),
    "likely_swapped": (lambda a, b: likely_swapped(a - b, 2), lambda: PAIRS),
}


@pytest.mark.parametrize(("name", "fused"), [*((name, False) for name in EXPORTS), ("napo_loss", True)])
def test_an_exported_function_gives_the_same_numbers(name, fused, monkeypatch):
    monkeypatch.setattr(objective_loss, "_can_fuse", lambda *_: fused)
    function, given = EXPORTS[name]
    program = torch.export.export(Exported(function), given())
    found, expected = (torch.utils._pytree.tree_leaves(f(*given())) for f in (program.module(), function))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


# NaN


@pytest.mark.parametrize("way", WAYS)
def test_nan_in_one_sequence_stays_there(way):
    """Up to the sums, and backward to its own rows; of the head, which all share, the gradient is NaN as always."""
    name = "hidden" if way == "hidden" else "logits"
    clean, x = inputs(), inputs()
    with torch.no_grad():
        x[name][2, 4] = torch.nan
    sums = []
    for t in (clean, x):
        total = WAYS[way](t).sum
        (grad,) = torch.autograd.grad(total.sum(), t[name])
        sums.append((total.detach(), grad))
    others = torch.tensor([0, 1, 3])
    assert sums[1][0][2].isnan()
    for a, b in zip(sums[1], sums[0], strict=True):
        assert torch.equal(a[others], b[others])


HALVES = [(torch.float16, torch.bfloat16), (torch.bfloat16, torch.float16)]


@pytest.mark.parametrize(("dtype", "cast_to"), HALVES)
def test_half_precision_under_an_autocast_to_the_other(dtype, cast_to):
    """PyTorch stacks nothing there: neither negatives by name, nor lengths, moments, or the gradients of pairs."""
    x = torch.tensor([-10.0, -12.0, -30.0, -9.0], dtype=dtype, requires_grad=True)
    length = torch.tensor([3.0, 4.0, 5.0, 6.0], dtype=dtype)
    moments = torch.tensor([3.0, 20.0], dtype=dtype)
    recipe = Recipe(Negative(margin="mean"), decay=0.5)
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", cast_to, enabled=enabled):
            chosen, rejected = SequenceLogps(x, length).pairs()
            named = {"rejected": rejected, "image_only": rejected}
            previous = Moments(*(m.expand(2) for m in moments))
            out = napo_loss(chosen, named, None, None, recipe=recipe, previous_moments=previous)
            found.append([out.losses, out.q, out.weights, *torch.autograd.grad(out.losses.sum(), x)])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_nan_reaches_the_batch_through_q_and_dynamic_weights_alone():
    chosen, rejected = (t.clone() for t in PAIRS)
    chosen[1] = torch.nan
    others = torch.tensor([0, 2, 3, 4])

    def nans(**recipe):
        return napo_loss(chosen, rejected, None, None, recipe=Recipe(**recipe)).losses.isnan()

    assert nans(negatives=Negative(q=0.3)).tolist() == [False, True, False, False, False]
    assert nans(negatives=Negative(), q_from="each_pair").tolist() == [False, True, False, False, False]
    for estimator in ("released", "paper", "moment"):
        assert nans(negatives=Negative(estimator=estimator)).all()
    fixed = {"rejected": Negative(q=0.3), "image_only": Negative(q=0.3)}
    pairs = dict.fromkeys(fixed, rejected)
    for weights, reached in (("fixed", False), ("dynamic", True)):
        out = napo_loss(chosen, pairs, None, None, recipe=Recipe(fixed, weights=weights))
        assert out.losses[1].isnan()
        assert bool(out.losses[others].isnan().all()) is reached
        assert bool(out.losses[others].isnan().any()) is reached

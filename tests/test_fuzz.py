"""The fuzzer itself: some hundred cases of fixed seeds are right, and each of many faults is noticed."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

import pytest
import torch

import napo_loss
import processes
from fuzz import __main__ as command
from fuzz.cases import Case, drawn
from fuzz.report import Tally, written
from fuzz.running import ALONE, Runner
from fuzz.spaces import GROUPS, SPACES
from napo_loss.logps import eager, factored, linear, logits
from napo_loss.logps.records import Head
from napo_loss.objective import eager as objective
from napo_loss.objective import estimators
from napo_loss.objective.negatives import BatchLogps

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tensors are on the CPU, kernels interpreted")
FEW = 40
MANY = 210


def runs(seeds: range, functions: tuple[str, ...], runner: Runner) -> None:
    cases = [case for case in map(drawn, seeds) if case.function in functions]
    wrong = [f"{case}\n  {message}" for case in cases if (message := runner.wrong(case))]
    assert not wrong, "\n".join(wrong)


def test_cases_are_right():
    runs(range(FEW), tuple(ALONE), Runner())


@pytest.mark.slow
def test_more_cases_are_right():
    runs(range(FEW, FEW + MANY), tuple(ALONE), Runner())


@pytest.mark.slow
def test_cases_of_several_ranks_are_right(ranks):
    for function in GROUPS:
        for seed in range(4):
            case = drawn(seed, function)
            assert Runner(ranks).wrong(case) is None, case


@pytest.mark.slow
def test_the_command_runs_in_processes(tmp_path):
    page = tmp_path / "fuzz.md"
    options = ["--cases", "30", "--seed", "50", "--alone", "--jobs", "2", "--report", page]
    run = processes.run([sys.executable, "-m", "tests.fuzz", *options])
    assert run.returncode == 0, run.stdout + run.stderr
    assert "0 wrong" in page.read_text()


def test_a_seed_is_a_case_and_every_value_is_drawn():
    assert drawn(7) == drawn(7)
    cases = [drawn(seed) for seed in range(2000)]
    assert {case.function for case in cases} == set(SPACES)
    seen = {(case.function, name, str(value)) for case in cases for name, value in case.options.items()}
    for function in ("sequence_logps", "linear_sequence_logps", "napo_loss"):
        for name, values in SPACES[function].items():
            assert {(function, name, str(value)) for value in values} <= seen, (function, name)


def ignored_stride(monkeypatch):
    original = eager.logps_forward

    def reads(logits, *rest):
        if logits.untyped_storage().size() < (logits.storage_offset() + logits.numel()) * logits.element_size():
            return original(logits, *rest)
        strides = torch.empty(logits.shape, device="meta").stride()
        return original(logits.as_strided(logits.shape, strides), *rest)

    monkeypatch.setattr(eager, "logps_forward", reads)


def q_of_sums(monkeypatch):
    original = objective.margins_of
    monkeypatch.setattr(objective, "margins_of", lambda batch: (m := original(batch))._replace(seen=m.psi.detach()))


def no_token_weights(monkeypatch):
    monkeypatch.setattr(eager, "aligned_weights", lambda active, weights, shift, dtype: active.to(dtype))


def no_weights_of_negatives(monkeypatch):
    monkeypatch.setattr(objective, "_fixed_weights", lambda negatives, margins: torch.ones_like(margins))


def no_slope_of_the_softcap(monkeypatch):
    original = eager._shape_logits

    def forgets(*args):
        original(*args)

    monkeypatch.setattr(eager, "_shape_logits", forgets)


def no_lora_scale(monkeypatch):
    original = Head.of.__func__
    monkeypatch.setattr(
        Head, "of", classmethod(lambda cls, *args, **given: original(cls, *args, **given)._replace(lora_scale=1.0))
    )


def sequences_that_predict_each_other(monkeypatch):
    original = logits.targets
    for module in (logits, linear):
        monkeypatch.setattr(
            module, "targets", lambda labels, shift, ignore, packing=None: original(labels, shift, ignore)
        )


def an_argument_written_over(monkeypatch):
    original = napo_loss.napo_loss

    def writes(*logps, **given):
        out = original(*logps, **given)
        policy = getattr(logps[0], "sum", logps[0])
        if isinstance(policy, torch.Tensor):
            policy.detach().add_(1)
        return out

    monkeypatch.setattr(napo_loss, "napo_loss", writes)


def a_result_that_is_an_argument(monkeypatch):
    original = napo_loss.margin_moments

    def shares(margin, **given):
        found = original(margin, **given)
        return found._replace(mean=margin.detach()) if torch.equal(found.mean, margin) else found

    monkeypatch.setattr(napo_loss, "margin_moments", shares)


def no_smoothing(monkeypatch):
    monkeypatch.setattr(estimators, "smooth", lambda moments, previous, decay: moments)


def no_bias_where_logits_are_computed_again(monkeypatch):
    original = eager.linear_block
    monkeypatch.setattr(eager, "linear_block", lambda *args, **given: original(*args, **{**given, "bias": None}))


def one_nan_for_all(monkeypatch):
    original = eager.logps_reduce

    def spreads(*args):
        sums, *rest = original(*args)
        return sums * 0 + sums.sum() if sums.isnan().any() else sums, *rest

    monkeypatch.setattr(eager, "logps_reduce", spreads)


def a_bound_that_forgets_rows(monkeypatch):
    """As it was before the fuzzer: of more active positions than the bound, those left out counted as 0."""
    original = factored.forward

    def forward(call, budget, steps):
        found = original(call, budget, steps)
        if not found.logp.isnan().all():
            return found
        left = (call.targets != call.ignore_index).flatten().nonzero()[call.max_active :, 0]
        return found._replace(logp=found.logp.flatten().index_fill(0, left, 0.0).view_as(found.logp))

    monkeypatch.setattr(factored, "forward", forward)


def entropy_in_bits(monkeypatch):
    original = factored.forward

    def forward(call, budget, steps):
        found = original(call, budget, steps)
        if call.token_statistics:
            found.statistics[0] /= math.log(2)
        return found

    monkeypatch.setattr(factored, "forward", forward)


def losses_in_half_precision(monkeypatch):
    original = objective._transform
    monkeypatch.setattr(objective, "_transform", lambda *args, **given: original(*args, **given).bfloat16().float())


def the_paper_without_beta(monkeypatch):
    original = objective._q_of_negative
    monkeypatch.setattr(objective, "_q_of_negative", lambda negative, moments, beta: original(negative, moments, 0.1))


def a_kernel_without_the_last_column(monkeypatch):
    from napo_loss.kernels import logps_forward as kernel

    original = kernel.logps_forward

    def shortened(x, *rest):
        if x.shape[-1] % 2 == 0:
            return original(x, *rest)
        return original(x.clone().index_fill_(-1, torch.tensor(x.shape[-1] - 1), -torch.inf), *rest)

    monkeypatch.setattr(kernel, "logps_forward", shortened)


def padding_in_the_mean(monkeypatch):
    monkeypatch.setattr(BatchLogps, "pairs", lambda self: self.policy_rejected.shape[-1])


def losses_of_padding(monkeypatch):
    monkeypatch.setattr(objective, "where", lambda mask, margins: margins)


EAGER = {"backend": "eager", "fused": False, "call": "plain"}
FAULTS: dict[Callable, tuple[str, dict]] = {
    ignored_stride: ("sequence_logps", EAGER),
    q_of_sums: ("napo_loss", EAGER),
    no_token_weights: ("sequence_logps", EAGER),
    no_weights_of_negatives: ("napo_loss", EAGER),
    no_slope_of_the_softcap: ("linear_sequence_logps", EAGER),
    no_lora_scale: ("linear_sequence_logps", EAGER),
    sequences_that_predict_each_other: ("sequence_logps", EAGER),
    an_argument_written_over: ("napo_loss", EAGER),
    a_result_that_is_an_argument: ("margin_moments", {"call": "plain"}),
    no_smoothing: ("margin_moments", {"call": "plain"}),
    no_bias_where_logits_are_computed_again: ("linear_sequence_logps", {**EAGER, "budget": 1}),
    one_nan_for_all: ("sequence_logps", {**EAGER, "values": "nan"}),
    a_bound_that_forgets_rows: ("linear_sequence_logps", {**EAGER, "max_active": "less"}),
    entropy_in_bits: ("linear_sequence_logps", EAGER),
    losses_in_half_precision: ("napo_loss", EAGER),
    the_paper_without_beta: ("napo_loss", {**EAGER, "estimator": "paper"}),
    padding_in_the_mean: ("napo_loss", {**EAGER, "pair_mask": "some"}),
    losses_of_padding: ("napo_loss", {**EAGER, "pair_mask": "some"}),
    a_kernel_without_the_last_column: ("sequence_logps", {"backend": "triton", "call": "plain", "V": 5, "T": 2}),
}
"""What is broken, in which function it shows, and what of its cases is held."""


def noticed(function: str, held: dict, most: int = 200) -> Case | None:
    """The first case that is wrong."""
    held = {name: value for name, value in held.items() if name in SPACES[function]}
    cases = (drawn(seed, function).changed(**held) for seed in range(most))
    return next((case for case in cases if Runner().wrong(case)), None)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_a_fault_is_noticed(fault, monkeypatch):
    function, held = FAULTS[fault]
    fault(monkeypatch)
    assert noticed(function, held) is not None


def test_a_failing_case_is_made_simpler_and_told(monkeypatch, capsys):
    no_slope_of_the_softcap(monkeypatch)
    case = noticed("linear_sequence_logps", EAGER)
    failure = Runner().failure(case)
    simple = failure.simplest
    assert simple.options["softcap"] is not None
    assert len(str(simple)) < len(str(case))
    assert Runner().wrong(simple)
    assert "gradient of" in failure.message
    tally = Tally()
    tally.add(case, failure)
    page = written(tally, "a command", 8)
    assert "**1 cases, 1 wrong.**" in page
    assert str(simple) in page
    seed = next(s for s in range(400) if Runner().wrong(drawn(s, "linear_sequence_logps")))
    assert command.replay(seed, "linear_sequence_logps") == 1
    assert "simplest: seed" in capsys.readouterr().out


def test_what_is_right_replays_as_right(capsys):
    assert command.replay(3, "likely_swapped") == 0
    assert "right" in capsys.readouterr().out

"""The operators inside PyTorch: opcheck, torch.compile, autocast, no_grad, double backward, process groups."""

from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from draws import quick
from napo_loss import (
    LowRank,
    NaPOLoss,
    Negative,
    Recipe,
    SequenceLogps,
    linear_sequence_logps,
    margin_moments,
    napo_loss,
    noise_aware_dpo_loss,
    noise_level,
    sequence_logps,
)
from napo_loss.logps import ops
from napo_loss.logps.calls import LogitsCall
from napo_loss.objective import loss as objective
from napo_loss.objective import ops as objective_ops
from napo_loss.objective.negatives import BatchLogps, PreferenceBatch


def example(requires_grad=True):
    torch.manual_seed(0)
    logits = torch.randn(4, 5, 33, requires_grad=requires_grad)
    labels = torch.randint(0, 33, (4, 5))
    labels[:, :2] = -100
    return logits, labels


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("weighted", [False, True])
def test_opcheck_sequence_logps(backend, weighted):
    logits, labels = example()
    weights = torch.rand(4, 5) if weighted else None
    call = LogitsCall(logits, labels, weights, backend=backend)
    opcheck(ops.sequence_logps.definition, (), call.to_schema())
    _, _, normalizer = ops.sequence_logps(**call.to_schema())
    call = replace(call, logits=logits.detach())
    opcheck(ops.sequence_logps_backward.definition, (torch.ones(4), normalizer.detach()), call.to_schema())
    opcheck(ops.sequence_logps_backward_.definition, (torch.ones(4), normalizer.detach()), call.to_schema())


def test_opcheck_objective():
    torch.manual_seed(0)
    logps = BatchLogps(
        torch.randn(4, requires_grad=True), torch.randn(2, 4, requires_grad=True), torch.zeros(4), torch.zeros(2, 4),
        torch.ones(4), torch.ones(2, 4), torch.tensor([[True, True, True, False], [True, False, True, False]]),
    )  # fmt: skip
    negatives = (Negative(alpha=0.01), Negative(alpha=0.5, margin="mean", q=0.2))
    batch = PreferenceBatch(logps, negatives, dynamic=True, average=False, stacked=True)
    call = objective_ops.ObjectiveCall.of(batch, 0.1, Recipe())
    opcheck(objective_ops.objective.definition, tuple(call.to_schema().values()))
    detached = replace(call, logps=BatchLogps(*(x.detach() for x in logps)))
    opcheck(objective_ops.objective_means.definition, tuple(detached.to_schema().values()))
    opcheck(objective_ops.objective_backward.definition, (torch.rand(3, 4), torch.rand(4)))


def test_a_call_survives_its_schema():
    logps = BatchLogps(*[torch.rand(2)] * 4, None, None)
    batch = PreferenceBatch(logps, (Negative(q=0.25), Negative()), dynamic=False, average=False, stacked=True)
    call = objective_ops.ObjectiveCall.of(batch, 0.1, Recipe(sft_weight=0.5, decay=0.25))
    schema = call.to_schema()
    assert list(schema) == list(call.SCHEMA)
    again = objective_ops.ObjectiveCall.from_schema(*schema.values())
    assert again == call
    assert call.gradients(policy_rejected=batch.logps.policy_rejected)[1] is batch.logps.policy_rejected
    with pytest.raises(TypeError, match=r"ObjectiveCall has no arguments \['policy'\]"):
        call.gradients(policy=None)


def step(logits, labels, backend="eager"):
    chosen, rejected = sequence_logps(logits, labels, backend=backend).pairs()
    out = napo_loss(chosen, rejected, torch.zeros(2), torch.zeros(2))
    return out.losses.mean(), out.q


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("fused", [False, True])
def test_compiles_as_one_graph(backend, fused, monkeypatch):
    monkeypatch.setattr(objective, "_can_fuse", lambda *_: fused)
    torch._dynamo.reset()
    logits, labels = example()
    eager_loss, eager_q = step(logits, labels, backend)
    (eager_grad,) = torch.autograd.grad(eager_loss, logits)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    loss, q = compiled(logits, labels, backend)
    (grad,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(loss, eager_loss)
    torch.testing.assert_close(q, eager_q)
    torch.testing.assert_close(grad, eager_grad)


def of_floats():
    """Every float that a public function takes, by name, as a function of it."""
    pc, pr, moments = -torch.rand(4), -torch.rand(4), torch.rand(2)
    hidden, weight, labels = torch.randn(2, 5, 8), torch.randn(16, 8), torch.randint(0, 16, (2, 5))
    lora = torch.randn(2, 8), torch.randn(16, 2)

    def loss(beta=0.1, previous=None, **settings):
        recipe = Recipe(**settings)
        return napo_loss(pc, pr, None, None, beta=beta, recipe=recipe, previous_moments=previous).losses

    return {
        "beta": lambda x: loss(beta=x),
        "sft_weight": lambda x: loss(sft_weight=x),
        "decay": lambda x: loss(decay=x, previous=moments),
        "Negative.alpha": lambda x: loss(negatives=Negative(alpha=x)),
        "Negative.q": lambda x: loss(negatives=Negative(q=x)),
        "Negative.weight": lambda x: loss(negatives=Negative(weight=x)),
        "NaPOLoss.beta": lambda x: NaPOLoss(beta=x)(pc, pr, None, None).losses,
        "dpo beta": lambda x: noise_aware_dpo_loss(pc, pr, None, None, beta=x, q=0.5).losses,
        "dpo q": lambda x: noise_aware_dpo_loss(pc, pr, None, None, q=x).losses,
        "alpha": lambda x: noise_level(pc - pr, alpha=x),
        "bounds": lambda x: noise_level(pc - pr, bounds=(x / 2, x)),
        "margin_moments.decay": lambda x: margin_moments(pc - pr, previous=moments, decay=x).mean,
        "softcap": lambda x: linear_sequence_logps(hidden, weight, labels, softcap=x).sum,
        "logit_scale": lambda x: linear_sequence_logps(hidden, weight, labels, logit_scale=x).sum,
        "LowRank.scale": lambda x: linear_sequence_logps(hidden, LowRank(weight, *lora, x), labels).sum,
    }


@pytest.mark.parametrize("fused", quick([False], [False, True]))
@pytest.mark.parametrize("name", of_floats())
def test_a_second_float_compiles_too(name, fused, monkeypatch):
    """The first is a constant to torch.compile, from the second on a symbol: checks must take one for a number."""
    monkeypatch.setattr(objective, "_can_fuse", lambda *_: fused)
    torch.manual_seed(0)
    torch._dynamo.reset()
    function = of_floats()[name]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for x in (0.5, 0.25, 0.75):
        torch.testing.assert_close(compiled(x), function(x))


def test_does_not_recompile_for_new_batch_sizes_forever():
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(lambda x, y: sequence_logps(x, y).sum, fullgraph=True, backend=counter)
    for T in range(3, 9):
        compiled(torch.randn(2, T, 7), torch.zeros(2, T, dtype=torch.long))
    assert counter.frame_count <= 2  # once static, once with dynamic shapes


def test_autocast_and_no_grad():
    logits, labels = example()
    plain = sequence_logps(logits, labels).sum
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = sequence_logps(logits, labels)
        assert out.sum.dtype == torch.float32
        assert napo_loss(*out.pairs(), None, None).losses.dtype == torch.float32
        half = sequence_logps(logits @ torch.eye(33), labels).sum  # logits that autocast made bf16
    torch.testing.assert_close(out.sum, plain)
    torch.testing.assert_close(half, plain, rtol=1e-2, atol=1e-2)
    with torch.no_grad():
        assert not sequence_logps(logits, labels).sum.requires_grad
    assert out.sum.requires_grad
    assert not out.length.requires_grad


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_double_backward_is_a_clear_error(backend):
    logits, labels = example()
    (grad,) = torch.autograd.grad(sequence_logps(logits, labels, backend=backend).sum.sum(), logits, create_graph=True)
    with pytest.raises(NotImplementedError, match="cannot be differentiated twice"):
        grad.sum().backward()


def test_double_backward_of_the_fused_objective_is_a_clear_error(monkeypatch):
    monkeypatch.setattr(objective, "_can_fuse", lambda *_: True)
    pc = torch.zeros(2, requires_grad=True)
    losses = napo_loss(pc, torch.zeros(2), None, None).losses
    (grad,) = torch.autograd.grad(losses.sum(), pc, create_graph=True)
    with pytest.raises(NotImplementedError, match="cannot be differentiated twice"):
        grad.sum().backward()


def test_one_buffer_goes_back_from_the_objective_to_the_logits(monkeypatch):
    """From the fused objective, pairs() hands its gradient on without a copy: that keeps backward at two launches."""
    monkeypatch.setattr(objective, "_can_fuse", lambda *_: True)
    seen = []
    flat = torch.randn(8, requires_grad=True)
    flat.register_hook(lambda g: seen.append(g))
    written = []
    scale = objective_ops.objective_backward
    monkeypatch.setattr(objective_ops, "objective_backward", lambda *a: written.append(scale(*a)) or written[-1])
    napo_loss(*SequenceLogps(flat, torch.ones(8)).pairs(3), None, None).losses.sum().backward()
    assert seen[0].data_ptr() == written[0].data_ptr()
    torch.testing.assert_close(flat.grad.view(4, 2), written[0])


class Seen(TorchDispatchMode):
    """The names of this library's operators that a mode meets."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace == "napo_loss":
            self.names.append(operator._opname)
        return operator(*args, **(kwargs or {}))


NAMES = ["sequence_logps", "objective", "objective_backward", "sequence_logps_backward"]


def gradient(logits, labels):
    return torch.autograd.grad(step(logits, labels)[0], logits)[0]


def test_who_watches_meets_the_operators(monkeypatch):
    monkeypatch.setattr(objective, "_can_fuse", lambda *_: True)
    logits, labels = example()
    plain = gradient(logits, labels)
    with Seen() as seen:
        assert torch.equal(gradient(logits, labels), plain)
    assert seen.names == NAMES
    traced = make_fx(gradient)(logits, labels)
    targets = [node.target for node in traced.graph.nodes]
    assert [x._opname for x in targets if getattr(x, "namespace", "") == "napo_loss"] == NAMES
    torch.testing.assert_close(traced(logits, labels), plain)
    mode = FakeTensorMode()
    fake = mode.from_tensor(logits), mode.from_tensor(labels)
    assert isinstance(sequence_logps(*fake).sum, FakeTensor)  # no mode is on: they bring theirs


def test_an_exported_program_holds_the_operator():
    class Logps(torch.nn.Module):
        def forward(self, logits, labels):
            return sequence_logps(logits, labels).sum

    logits, labels = example(requires_grad=False)
    program = torch.export.export(Logps(), (logits, labels))
    assert torch.ops.napo_loss.sequence_logps.default in [node.target for node in program.graph.nodes]
    assert torch.equal(program.module()(logits, labels), Logps()(logits, labels))


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_what_is_written_over_has_another_version(backend):
    """So that autograd refuses to read what was saved before."""
    logits, labels = example()
    x = logits * 1
    square = (x * x).sum()
    sequence_logps(x, labels, inplace_backward=True, backend=backend).sum.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()


def test_losses_may_be_changed_in_place(monkeypatch):
    """As trainers do: they are no views of what else the operator returns."""
    monkeypatch.setattr(objective, "_can_fuse", lambda *_: True)
    pc = torch.zeros(2, requires_grad=True)
    losses, chosen, rejected = napo_loss(pc, torch.zeros(2), None, None)
    losses += 1
    losses *= torch.tensor([1.0, 0.0])
    chosen *= 2
    rejected *= 2
    losses.sum().backward()
    assert pc.grad[0] < 0
    assert pc.grad[1] == 0


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpoints_around_the_head(backend, reentrant):
    """The saved tensors of a checkpoint may be read once."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 5, 8, requires_grad=True), torch.randn(33, 8, requires_grad=True)
    labels = torch.randint(0, 33, (2, 5))

    def logps(hidden, weight):
        return linear_sequence_logps(hidden, weight, labels, backend=backend).sum

    logps(hidden, weight).sum().backward()
    expected = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    checkpoint(logps, hidden, weight, use_reentrant=reentrant).sum().backward()
    assert torch.equal(hidden.grad, expected[0])
    assert torch.equal(weight.grad, expected[1])


@pytest.mark.parametrize("compiled", [False, True])
def test_settings_are_copied_to_the_device_once(compiled, monkeypatch):
    """Each copy is a host sync."""
    monkeypatch.setattr(objective, "_can_fuse", lambda *_: True)
    torch._dynamo.reset()
    objective_ops.on_device.cache_clear()

    def losses(x):
        return napo_loss(x, x, None, None, recipe=Recipe(Negative(estimator="moment"))).losses

    function = torch.compile(losses, backend="aot_eager") if compiled else losses
    for _ in range(3):
        function(torch.zeros(2))
    assert objective_ops.on_device.cache_info().misses == 1


def test_a_gradient_of_no_argument_is_an_error():
    """What backward returns by a name that the schema lacks would be lost without a word."""
    with pytest.raises(TypeError, match=r"LogitsCall has no arguments \['hidden'\]"):
        LogitsCall.gradients(logits=torch.zeros(1), hidden=torch.zeros(1))
    found = LogitsCall.gradients(logits=torch.zeros(1))
    assert [x is not None for x in found] == [name == "logits" for name in LogitsCall.SCHEMA]

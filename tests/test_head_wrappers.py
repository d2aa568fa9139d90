"""fused_head under what wraps, copies, keeps or spreads a model."""

import copy
import io
import threading

import accelerate
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import tiny
from draws import quick
from napo_loss import fused_head, sequence_logps
from napo_loss.hf.wrappers import caller

IDS = torch.randint(4, 20, (3, 9), generator=torch.Generator().manual_seed(0))
LABELS = IDS.clone()
LABELS[:, :3] = -100


def gradients(model):
    found = {name.replace("_orig_mod.", ""): p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def expected(model=None):
    model = model or tiny.llama()
    logps = sequence_logps(model(input_ids=IDS).logits, LABELS).sum
    logps.sum().backward()
    return logps.detach(), gradients(model)


def run(model):
    with fused_head(model):
        return model(input_ids=IDS, labels=LABELS).sum


def assert_right(logps, model, right=None):
    logps.sum().backward()
    values, grads = right or expected()
    torch.testing.assert_close(logps.detach(), values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients(model), grads, rtol=1e-4, atol=1e-5)


def outside(model):
    return torch.compile(model, backend="aot_eager")


def in_place(model):
    model.compile(backend="aot_eager")
    return model


def by_region(model):
    for layer in model.model.layers:
        layer.compile(backend="aot_eager")
    return model


graph_breaks = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
"""Dynamo looks at the attributes of the tensors that it resumes with."""


@graph_breaks
@pytest.mark.parametrize("compiled", quick([by_region], [outside, in_place, by_region]))
@pytest.mark.parametrize("used_before", quick([True], [False, True]))
def test_compiled_models(compiled, used_before):
    torch.compiler.reset()
    model = compiled(tiny.llama())
    if used_before:
        model(input_ids=IDS)
    assert_right(run(model), model)
    assert hasattr(model(input_ids=IDS), "logits")
    assert_right(run(model), model)


@graph_breaks
def test_a_compiled_step():
    torch.compiler.reset()
    model = tiny.llama()
    assert_right(torch.compile(run, backend="aot_eager")(model), model)


def test_copies_made_inside_run_on_their_own_weights_and_are_free_afterwards():
    model = tiny.llama()
    with fused_head(model):
        twin = copy.deepcopy(model)
        average = torch.optim.swa_utils.AveragedModel(model)
        file = io.BytesIO()
        torch.save(model, file)
        with torch.no_grad():
            twin.lm_head.weight.mul_(10)
        inside = twin(input_ids=IDS, labels=LABELS).sum
        assert_right(model(input_ids=IDS, labels=LABELS).sum, model)
    right = expected(copy.deepcopy(twin))
    assert_right(inside, twin, right)
    file.seek(0)
    for other in (twin, average, torch.load(file, weights_only=False)):
        assert hasattr(other(input_ids=IDS, labels=LABELS), "logits")
    assert_right(run(twin), twin, right)
    assert_right(run(average), average.module)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_around_the_whole_model(reentrant):
    model = tiny.llama()
    embedded = model.get_input_embeddings()(IDS)  # of which reentrant checkpointing asks a gradient
    with fused_head(model):
        logps = checkpoint(
            lambda x: model(inputs_embeds=x, labels=LABELS).sum, embedded, use_reentrant=reentrant
        )  # fmt: skip
        assert_right(logps, model)


def test_accelerate_autocast_stays(monkeypatch):
    # Its settings are one object for the process, which trainers of other tests have made already.
    monkeypatch.setattr(accelerate.state.AcceleratorState, "_shared_state", {})
    model, seen = tiny.llama(), []
    model.model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    model = accelerate.Accelerator(mixed_precision="bf16", cpu=True).prepare(model)
    right = sequence_logps(model(input_ids=IDS).logits, LABELS).sum
    logps = run(model)
    assert set(seen) == {torch.bfloat16}
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps, right, rtol=1e-2, atol=0.05)


def test_accelerate_offload():
    model = accelerate.cpu_offload(tiny.llama(), torch.device("cpu"))
    assert model.lm_head.weight.device.type == "meta"
    values, _ = expected()
    with torch.no_grad():
        torch.testing.assert_close(run(model), values, rtol=1e-5, atol=1e-5)
    assert model.lm_head.weight.device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights(dtype):
    model = tiny.llama().to(dtype)
    right = sequence_logps(model(input_ids=IDS).logits.double(), LABELS).sum.float()
    torch.testing.assert_close(run(model), right, rtol=1e-2, atol=0.1)


def test_contexts_in_each_other_and_calls_after_an_error():
    model = tiny.llama()
    with fused_head(model), fused_head(model):
        assert_right(model(input_ids=IDS, labels=LABELS).sum, model)
    with fused_head(model):
        with pytest.raises(IndexError):
            model(input_ids=IDS + 1000, labels=LABELS)
        hidden = torch.randn(2, 5, 32)
        assert model.lm_head(hidden).shape == (2, 5, model.config.vocab_size)  # no call is left half done
        assert_right(model(input_ids=IDS, labels=LABELS).sum, model)
    assert not model._forward_hooks
    assert not model.lm_head._forward_hooks
    assert not model._forward_pre_hooks


def test_threads_do_not_see_each_other():
    model, found = tiny.llama(), {}
    with fused_head(model), torch.no_grad():
        together = threading.Barrier(2)

        def work(i):
            with torch.no_grad():
                together.wait()
                found[i] = [model(input_ids=IDS[i : i + 1], labels=LABELS[i : i + 1]).sum for _ in range(10)]

        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    values = expected()[0]
    for i in range(2):
        for logps in found[i]:
            torch.testing.assert_close(logps, values[i : i + 1], rtol=1e-5, atol=1e-5)


def test_dropout_draws_the_same_numbers_as_without():
    """The pass that reads off the logits leaves the random state alone, so a run can be repeated and resumed."""
    model = tiny.llama().train()
    model.config.attention_dropout = 0.3
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.3
    torch.manual_seed(5)
    right = sequence_logps(model(input_ids=IDS).logits, LABELS).sum
    after = torch.rand(1)
    torch.manual_seed(5)
    torch.testing.assert_close(run(model), right, rtol=1e-5, atol=1e-5)
    assert torch.equal(torch.rand(1), after)


def test_generation_and_a_cache_inside_are_the_models_own():
    model = tiny.llama()
    right = model.generate(IDS, max_new_tokens=3, do_sample=False)
    with fused_head(model):
        assert torch.equal(model.generate(IDS, max_new_tokens=3, do_sample=False), right)
        assert model(input_ids=IDS).past_key_values is not None


def test_a_sequence_that_counts_nothing_and_one_of_a_single_token():
    model = tiny.llama()
    labels = LABELS.clone()
    labels[1] = -100
    with fused_head(model):
        logps = model(input_ids=IDS, labels=labels)
        assert logps.sum[1] == 0
        assert logps.length.tolist() == [6, 0, 6]
        logps.sum.sum().backward()
        one = model(input_ids=IDS[:, :1], labels=IDS[:, :1])
    assert one.sum.tolist() == [0, 0, 0]


def test_hooks_sit_on_the_outermost_whose_call_is_the_models():
    """Through what spreads a model, not into what compiles it, nor into PEFT, which passes hooks further in by."""

    class Spreads(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    class Adapts(torch.nn.Module):
        def get_base_model(self):
            return torch.nn.Identity()

    plain, adapted = torch.nn.Linear(1, 1), Adapts()
    compiled = torch.compile(plain, backend="eager")
    for model, outermost in (
        (plain, plain), (compiled, compiled), (adapted, adapted), (Spreads(plain), plain),
        (Spreads(Spreads(plain)), plain), (Spreads(compiled), compiled), (Spreads(adapted), adapted),
    ):  # fmt: skip
        assert caller(model) is outermost

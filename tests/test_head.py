"""fused_head on real architectures: the numbers of their own logits, PEFT, tied weights, DDP and FSDP2."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import tiny
from heads import assert_same, gradients
from napo_loss import fused_head, linear_sequence_logps, noise_aware_dpo_loss, sequence_logps
from ranks import Ranks

SIZE = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TOKENS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
MODELS = {
    "llama": tiny.llama,
    "tied": lambda: LlamaForCausalLM(tiny.text_config(tie_word_embeddings=True)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SIZE, **TOKENS, num_key_value_heads=1, head_dim=8, final_logit_softcapping=0.5)
    ),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**SIZE, **TOKENS, num_key_value_heads=1, logit_scale=0.25)),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**SIZE, **TOKENS, num_key_value_heads=1, logits_scaling=3.0)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2)),
}


def batch(V=20, N=4, T=7):
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(4, V, (N, T), generator=g)
    labels = ids.clone()
    labels[:, :3] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels


@pytest.mark.parametrize("name", MODELS)
def test_the_numbers_are_the_models_own(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    inputs, labels = batch()
    assert_same(model, inputs, labels)
    assert_same(model, inputs, labels, token_weights=torch.rand(labels.shape))


def test_a_vision_language_model():
    model = tiny.llava()
    ids = torch.tensor([[3] * 4 + [5, 6, 7], [3] * 4 + [8, 9, 5]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.rand(2, 3, 8, 8)}
    assert_same(model, inputs, ids.masked_fill(ids == 3, -100))


@pytest.mark.parametrize("disabled", [False, True])
@pytest.mark.parametrize("target", [["q_proj"], ["q_proj", "lm_head"]])
def test_peft(target, disabled):
    torch.manual_seed(0)
    model = get_peft_model(tiny.llama(), LoraConfig(r=2, target_modules=target, init_lora_weights=False))
    inputs, labels = batch()
    if not disabled:
        assert_same(model, inputs, labels)
        return
    with model.disable_adapter(), torch.no_grad():
        expected = sequence_logps(model(**inputs).logits, labels)
        with fused_head(model):
            torch.testing.assert_close(model(**inputs, labels=labels), expected, rtol=1e-5, atol=1e-5)


def test_two_adapters_and_a_saved_head():
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    model = get_peft_model(tiny.llama(), config)
    model.add_adapter("second", LoraConfig(r=3, lora_alpha=7, target_modules=["lm_head"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    assert_same(model, *batch())
    saved = get_peft_model(tiny.llama(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    assert_same(saved, *batch())


@pytest.mark.parametrize(
    ("options", "message"), [({"lora_dropout": 0.1}, "lora_dropout"), ({"use_dora": True}, "variant")]
)
def test_what_it_cannot_do_is_named(options, message):
    model = get_peft_model(tiny.llama(), LoraConfig(r=2, target_modules=["lm_head"], **options)).train()
    inputs, labels = batch()
    with fused_head(model), pytest.raises(NotImplementedError, match=message):
        model(**inputs, labels=labels)


def test_models_without_a_head_are_refused():
    with (
        pytest.raises(TypeError, match="output embeddings are a linear layer, got LlamaModel"),
        fused_head(tiny.llama().model),
    ):
        pass
    with pytest.raises(TypeError, match="got Linear with NoneType"), fused_head(torch.nn.Linear(2, 2)):
        pass


def test_the_auxiliary_loss_of_a_mixture_of_experts():
    torch.manual_seed(0)
    size = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.1, "num_key_value_heads": 1}
    model = MixtralForCausalLM(MixtralConfig(**SIZE, **TOKENS, **size)).eval()
    inputs, labels = batch()
    plain = model(**inputs, output_router_logits=True)
    with fused_head(model):
        assert model(**inputs, labels=labels).aux_loss is None
        logps = model(**inputs, labels=labels, output_router_logits=True)
    torch.testing.assert_close(logps.aux_loss, plain.aux_loss)
    torch.testing.assert_close(logps.sum, sequence_logps(plain.logits, labels).sum, rtol=1e-5, atol=1e-5)
    (logps.sum.sum() + logps.aux_loss).backward()
    assert model.model.layers[0].mlp.gate.weight.grad.abs().sum() > 0


def test_packed_sequences():
    model = MODELS["llama"]()
    inputs, labels = batch(N=2, T=6)
    positions = torch.arange(6).repeat(2)[None]
    with fused_head(model):
        padded = model(**inputs, labels=labels)
        packed = model(
            input_ids=inputs["input_ids"].view(1, -1), position_ids=positions, labels=labels.view(1, -1),
            cu_seq_lens_q=torch.tensor([0, 6, 12]), attention_mask=block_diagonal(2, 6),
        )  # fmt: skip
    torch.testing.assert_close(packed, padded, rtol=1e-4, atol=1e-4)


def block_diagonal(N, T):
    blocks = torch.block_diag(*[torch.ones(T, T).tril()] * N)
    return torch.zeros(1, 1, N * T, N * T).masked_fill(blocks == 0, float("-inf"))


def test_gradient_checkpointing_and_late_backward():
    model = MODELS["llama"]().train()
    inputs, labels = batch()
    with fused_head(model):
        plain = gradients(model, model(**inputs, labels=labels))
    model.gradient_checkpointing_enable()
    with fused_head(model):
        logps = model(**inputs, labels=labels)
    torch.testing.assert_close(gradients(model, logps), plain)  # after the context


def test_an_exception_leaves_the_model_as_it_was():
    model = tiny.llama()
    with pytest.raises(ZeroDivisionError), fused_head(model):
        raise ZeroDivisionError
    assert "forward" not in model.__dict__
    assert "forward" not in model.lm_head.__dict__


def test_a_shard_given_raw_is_refused_with_the_way_out():
    from torch.distributed.tensor import DTensor, Shard, init_device_mesh

    with one_process_group():
        weight = DTensor.from_local(torch.zeros(5, 4), init_device_mesh("cpu", (1,)), [Shard(0)])
        with pytest.raises(TypeError, match=r"weight is a DTensor.*napo_loss\.fused_head"):
            linear_sequence_logps(torch.zeros(1, 2, 4), weight, torch.zeros(1, 2, dtype=torch.long))


def one_process_group():
    from contextlib import contextmanager

    import torch.distributed as dist

    @contextmanager
    def group():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()

    return group()


def pair_model(tied):
    torch.manual_seed(0)
    return MODELS["tied" if tied else "llama"]()


def step(model, inputs, labels):
    """Losses and gradients of the mean loss over the pairs of the whole batch; DDP and FSDP2 average over ranks."""
    with fused_head(model):
        chosen, rejected = model(**inputs, labels=labels).pairs()
    losses = noise_aware_dpo_loss(chosen.sum, rejected.sum, None, None, beta=1.0, q=0.5).losses
    losses.mean().backward()
    return losses.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def two_ranks():
    """A world of two, no part of a larger one: transformers' tensor parallelism takes all ranks there are."""
    found = Ranks(2)
    yield found
    found.stop()


def check_agreement(group, how, tied, saved):
    inputs, labels = batch()
    expected_losses, expected = step(pair_model(tied), inputs, labels)
    model, rank, mesh = pair_model(tied), group.rank(), DeviceMesh.from_group(group, "cpu")
    if how.startswith("ddp"):
        model = DistributedDataParallel(model, process_group=group, find_unused_parameters=how == "ddp-unused")
    elif how == "tp":
        model = type(model).from_pretrained(saved, tp_plan="auto")
        assert type(model.lm_head.weight).__name__ == "DTensor"
    else:
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        if how == "fsdp2-head":
            fully_shard(model.lm_head, mesh=mesh)
        fully_shard(model, mesh=mesh)
    # A chosen and its rejected; under tensor parallelism both ranks have all pairs.
    order, here = ([0, 1, 2, 3], slice(None)) if how == "tp" else ([rank, rank + 2], slice(rank, rank + 1))
    mine = {name: x[order] for name, x in inputs.items()}
    losses, grads = step(model, mine, labels[order])
    torch.testing.assert_close(losses, expected_losses[here], rtol=1e-5, atol=1e-6)
    for name, grad in grads.items():
        grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        torch.testing.assert_close(grad, expected[name.removeprefix("module.")], rtol=1e-4, atol=1e-6, msg=name)
    assert len(grads) == len(expected)


def check_cast(group):
    """FSDP2 casts a model's output, in accelerate to bfloat16, which holds 1000 nats to the nearest 4; not the sums."""
    inputs, labels = batch()
    model = pair_model(tied=False)
    with torch.no_grad():
        model.lm_head.weight.mul_(30)
    with fused_head(model), torch.no_grad():
        expected = model(**inputs, labels=labels).sum
    policy = MixedPrecisionPolicy(output_dtype=torch.bfloat16)
    fully_shard(model, mesh=DeviceMesh.from_group(group, "cpu"), mp_policy=policy)
    assert model(**inputs).logits.dtype == torch.bfloat16
    with fused_head(model):
        logps = model(**inputs, labels=labels).sum
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps, expected, rtol=1e-5, atol=1e-5)
    logps.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.slow
def test_fsdp2_does_not_round_the_sums(two_ranks):
    two_ranks.run(2, check_cast)


def check_peft(group):
    """Gradients of LoRA on the head, of a PEFT model sharded as a whole, are those of one process."""

    def build():
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False, lora_bias=False)
        return get_peft_model(tiny.llama(), config)

    inputs, labels = batch()
    _, expected = step(build(), inputs, labels)
    model = build()
    fully_shard(model, mesh=DeviceMesh.from_group(group, "cpu"))
    order = [group.rank(), group.rank() + 2]
    _, grads = step(model, {name: x[order] for name, x in inputs.items()}, labels[order])
    assert any("lm_head.lora_B" in name for name in grads)
    for name, grad in grads.items():
        if expected[name] is None:
            assert grad is None
        else:
            torch.testing.assert_close(grad.full_tensor(), expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.slow
def test_fsdp2_around_peft_with_lora_on_the_head(two_ranks):
    two_ranks.run(2, check_peft)


@pytest.mark.parametrize(
    ("how", "tied"),
    [("ddp", False), ("ddp-unused", False), ("fsdp2", False), ("fsdp2", True), ("fsdp2-head", False), ("tp", False)],
    ids=["ddp", "ddp-unused", "fsdp2", "fsdp2-tied", "fsdp2-head", "tp"],
)
def test_two_ranks_agree_with_one_process(two_ranks, how, tied, tmp_path):
    pair_model(tied).save_pretrained(tmp_path)
    two_ranks.run(2, check_agreement, how, tied, str(tmp_path))

"""PEFT on and around the output projection: right with every gradient, or refused by one clear sentence."""

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from transformers import LlamaForCausalLM

import tiny
from heads import assert_same
from napo_loss import fused_head, sequence_logps

IDS = torch.randint(4, 20, (3, 9), generator=torch.Generator().manual_seed(0))
LABELS = IDS.clone()
LABELS[:, :3] = -100
INPUTS = {"input_ids": IDS}


def moved(model):
    """Adapters that do something: most begin as the identity."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    return model.eval()


pytestmark = [
    pytest.mark.filterwarnings("ignore:.*lora_bias=True. was passed but the targeted layer"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning"),
]


def adapted(config, tied=False):
    torch.manual_seed(0)
    return moved(get_peft_model(LlamaForCausalLM(tiny.text_config(tie_word_embeddings=tied)), config))


LORA = {"r": 2, "init_lora_weights": False}
CONFIGS = {
    "bias": (LoraConfig(**LORA, target_modules=["lm_head"], lora_bias=True), False),
    "bias, inside too": (LoraConfig(**LORA, target_modules=["lm_head", "q_proj"], lora_bias=True), False),
    "rslora": (LoraConfig(**LORA, target_modules=["lm_head"], use_rslora=True, lora_alpha=5), False),
    "tied": (LoraConfig(**LORA, target_modules=["lm_head"]), True),
    "trainable tokens, tied": (LoraConfig(**LORA, target_modules=["q_proj"], trainable_token_indices=[5, 6]), True),
    "trainable tokens": (
        LoraConfig(**LORA, target_modules=["q_proj"], trainable_token_indices={"lm_head": [5, 6]}),
        False,
    ),
    "saved head": (LoraConfig(**LORA, target_modules=["q_proj"], modules_to_save=["lm_head"]), False),
    "IA3 elsewhere": (IA3Config(target_modules=["q_proj"], feedforward_modules=[]), False),
    "prompt tuning": (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), False),
    "prefix tuning": (PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), False),
    "p-tuning": (PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, encoder_hidden_size=8), False),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_log_probs_and_gradients_are_those_of_the_logits(name):
    assert_same(adapted(*CONFIGS[name]), INPUTS, LABELS)


def test_several_adapters_their_biases_and_the_one_that_is_off():
    model = adapted(LoraConfig(**LORA, target_modules=["lm_head"], lora_bias=True))
    model.add_adapter("second", LoraConfig(r=3, lora_alpha=7, target_modules=["lm_head"], init_lora_weights=False))
    assert_same(moved(model), INPUTS, LABELS)
    model.base_model.set_adapter(["default", "second"])
    assert_same(model, INPUTS, LABELS)
    model.set_adapter("second")
    assert_same(model, INPUTS, LABELS)
    with model.disable_adapter(), torch.no_grad():
        expected = sequence_logps(model(input_ids=IDS).logits, LABELS)
        with fused_head(model):
            torch.testing.assert_close(model(input_ids=IDS, labels=LABELS), expected, rtol=1e-5, atol=1e-5)
    model.merge_adapter()
    with torch.no_grad():
        expected = sequence_logps(model(input_ids=IDS).logits, LABELS)
        with fused_head(model):
            torch.testing.assert_close(model(input_ids=IDS, labels=LABELS), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (IA3Config(target_modules=["lm_head"], feedforward_modules=[]), "not PEFT's ia3"),
        (LoHaConfig(r=2, target_modules=["lm_head"]), "not PEFT's loha"),
        (VeraConfig(r=2, target_modules=["lm_head"]), "not PEFT's vera"),
        (AdaLoraConfig(init_r=2, target_modules=["lm_head"], total_step=10), "not PEFT's adalora"),
        (LoraConfig(r=2, target_modules=["lm_head"], use_dora=True), "not the variant of adapter 'default'"),
        (LoraConfig(r=2, target_modules=["lm_head"], lora_dropout=0.1), "set lora_dropout of adapter 'default' to 0"),
    ],
    ids=["IA3", "LoHa", "VeRA", "AdaLoRA", "DoRA", "dropout"],
)  # fmt: skip
def test_other_adapters_on_the_head_are_refused_even_where_they_begin_as_the_identity(config, message):
    model = get_peft_model(tiny.llama(), config).train()
    with fused_head(model), pytest.raises(NotImplementedError, match=message):
        model(input_ids=IDS, labels=LABELS)
    assert hasattr(model(input_ids=IDS), "logits")


def test_adapters_of_the_half_precision_that_autocast_does_not_cast_to():
    config = LoraConfig(target_modules=["lm_head"], r=2, init_lora_weights=False)
    model = get_peft_model(tiny.llama().half(), config, autocast_adapter_dtype=False).eval()
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=IDS).logits
        with fused_head(model):
            ours = model(input_ids=IDS, labels=LABELS)
    torch.testing.assert_close(ours.sum, sequence_logps(logits, LABELS).sum, rtol=0.01, atol=0.1)


class Quantised(torch.nn.Linear):
    """What quantisation libraries put in place of a linear layer."""

    def __init__(self, linear, dtype):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        weight = (linear.weight.detach() * 50).round().to(dtype)
        self.weight = torch.nn.Parameter(weight, requires_grad=False)

    def forward(self, x):
        return x @ self.weight.to(x.dtype).T / 50


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_quantised_and_float8_heads_are_refused(dtype):
    model = tiny.llama()
    model.lm_head = Quantised(model.lm_head, dtype)
    with fused_head(model), pytest.raises(NotImplementedError, match=rf"got Quantised with a Parameter of {dtype}"):
        model(input_ids=IDS, labels=LABELS)
    with (
        torch.autocast("cpu", torch.bfloat16),
        fused_head(model),
        pytest.raises(NotImplementedError, match="quantisation"),
    ):
        model(input_ids=IDS, labels=LABELS)


class Scaled(torch.Tensor):
    """A weight of a class of its own, whose numbers mean something else."""


def test_tensor_subclasses_are_refused():
    model = tiny.llama()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().as_subclass(Scaled), requires_grad=False)
    with fused_head(model), pytest.raises(NotImplementedError, match="with a Scaled of"):
        model(input_ids=IDS, labels=LABELS)


def test_a_head_inside_a_sequential():
    model = tiny.llama()
    model.lm_head = torch.nn.Sequential(torch.nn.LayerNorm(32), model.lm_head)
    assert_same(model, INPUTS, LABELS)

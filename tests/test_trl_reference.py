"""The reference's log-probs, beside the policy's: one head and the same contexts, so that rewards start at 0."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from trl import DPOConfig, DPOTrainer

import tiny
from draws import quick
from napo_loss import napo_loss
from napo_loss.trl import NaPOConfig, NaPOTrainer
from trainers import NAMES, QUIET, TRL, Recorded, Version, arguments, gradients, logps_by_hand, pairs, trainer_for

pytestmark = QUIET
DTYPES = {"float32": {}, "autocast": {"bf16": True}, "bfloat16": {}}
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])


def louder(model, dtype):
    """Weights so large that another rounding shows."""
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4)
    return model.to(torch.bfloat16) if dtype == "bfloat16" else model


VARIANTS = {
    "full": {},
    "a name for the reference": {"reference": True},
    "LoRA": {"peft_config": LORA},
    "LoRA and a whole head": {"peft_config": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])},
    "a pretrained adapter": {"adapter": True},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "LoRA, reentrant checkpointing": {
        "peft_config": LORA, "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "accumulated": {"gradient_accumulation_steps": 2},
    "accumulated, q over the batch": {"gradient_accumulation_steps": 2, "q_over": "batch"},
    "vision": {"kind": "vision"},
    "vision, LoRA": {"kind": "vision", "peft_config": LORA},
    "without token metrics": {"token_metrics": False},
}  # fmt: skip


@pytest.mark.parametrize("dtype", quick(["bfloat16"], DTYPES))
@pytest.mark.parametrize("variant", VARIANTS)
def test_rewards_before_the_first_step_are_zero(variant, dtype, tmp_path):
    options = {**VARIANTS[variant], **DTYPES[dtype], "max_steps": 1}
    vision = options.pop("kind", None) == "vision"
    extra = {"peft_config": options.pop("peft_config")} if "peft_config" in options else {}
    model = louder(tiny.llava() if vision else tiny.llama(), dtype)
    reference = copy.deepcopy(model) if options.pop("reference", False) else None
    if options.pop("adapter", False):
        torch.manual_seed(1)
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    data = tiny.vision_pairs(4) if vision else pairs()
    trainer = Recorded(
        model, reference, arguments(NaPOConfig, tmp_path, **options), train_dataset=data,
        processing_class=tiny.processor() if vision else tiny.tokenizer(), **extra,
    )  # fmt: skip
    trainer.train()
    assert len(trainer.steps) == options.get("gradient_accumulation_steps", 1)
    for step in trainer.steps:
        assert {step[f"rewards/{name}"] for name in ("chosen", *NAMES)} == {0.0}
        assert step["logps/chosen"] < -10
        assert [step[f"napo/q/{name}"] for name in NAMES] == [0.0, 1.0, 1.0]


def test_rewards_of_a_long_answer_start_at_zero(tmp_path):
    """A vocabulary and a length at which two heads differ in bfloat16."""
    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8000, max_position_embeddings=512, pad_token_id=0, **size)).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(40)
    words = tiny.WORDS.split()[4:]
    draw = torch.randint(0, len(words), (8, 200), generator=torch.Generator().manual_seed(0)).tolist()
    answers = [" " + " ".join(words[i] for i in row) for row in draw]
    data = Dataset.from_dict({"prompt": ["the cat"] * 4, "chosen": answers[:4], "rejected": answers[4:]})
    trainer = Recorded(
        copy.deepcopy(model), model, arguments(NaPOConfig, tmp_path, bf16=True, max_steps=1, max_length=None),
        train_dataset=data, processing_class=tiny.tokenizer(),
    )  # fmt: skip
    trainer.train()
    assert trainer.steps[0]["rewards/chosen"] == trainer.steps[0]["rewards/rejected"] == 0
    assert trainer.steps[0]["logps/chosen"] < -1000


def test_peft_reference_is_the_base_model(tmp_path):
    trainer = trainer_for("text", tmp_path, peft_config=LORA)
    assert trainer.ref_model is None
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.train()
    with torch.no_grad(), trainer.model.disable_adapter():
        expected = logps_by_hand(trainer.model, batch).sum
    actual = trainer.reference_logps(batch)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    assert [len(x) for x in trainer.compute_ref_log_probs(trainer.model, batch)] == [2, 6]
    assert torch.equal(torch.cat(trainer.compute_ref_log_probs(trainer.model, batch)), actual)
    trained = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora" in name for name in trained)


def test_a_pretrained_adapter_is_its_own_reference(tmp_path):
    model = get_peft_model(tiny.llama(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    trainer = NaPOTrainer(
        model, args=arguments(NaPOConfig, tmp_path, learning_rate=1.0), train_dataset=tiny.text_pairs(4),
        processing_class=tiny.tokenizer(),
    )  # fmt: skip
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        expected = logps_by_hand(trainer.model, batch).sum
    trainer.train()
    assert abs(float(trainer.state.log_history[1]["rewards/chosen"])) > 1e-4
    actual = trainer.reference_logps(batch)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    assert trainer.model.active_adapter == "default"


def test_a_model_without_a_name_is_its_own_reference(tmp_path):
    model = tiny.llama()
    trainer = NaPOTrainer(
        model, args=arguments(NaPOConfig, tmp_path), train_dataset=tiny.text_pairs(4), processing_class=tiny.tokenizer()
    )
    before = copy.deepcopy(model.state_dict())
    trainer.train()
    for name, value in trainer.ref_model.state_dict().items():
        assert torch.equal(value, before[name])
    assert not torch.equal(model.lm_head.weight, trainer.ref_model.lm_head.weight)


PROMPTS = {
    "prompt tuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix tuning": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p-tuning": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
}


@pytest.mark.filterwarnings("ignore:.*past_key_values.*:FutureWarning")  # as PEFT 0.21 calls transformers 5.24
@pytest.mark.parametrize("kind", PROMPTS)
def test_prompt_learning_trains_as_in_trl(kind, tmp_path):
    data = pairs().remove_columns(["question_only", "image_only"])

    def run(trainer, config, **options):
        args = arguments(config, tmp_path, max_steps=3, max_grad_norm=0.0, **options)
        made = trainer(
            tiny.llama(), None, args, train_dataset=data, processing_class=tiny.tokenizer(),
            peft_config=copy.deepcopy(PROMPTS[kind]),
        )  # fmt: skip
        torch.manual_seed(0)
        with torch.no_grad():
            for p in made.model.parameters():
                if p.requires_grad:
                    p.normal_()
        made.train()
        return made.state.log_history[:-1]

    found = run(NaPOTrainer, NaPOConfig, negatives={"rejected": {"q": 0.0}})
    assert len({step["rewards/chosen"] for step in found}) == 3
    if Version("1.16") > TRL:
        return  # its trainer has no room for virtual tokens
    for ours, theirs in zip(found, run(DPOTrainer, DPOConfig), strict=True):
        for name in ("loss", "grad_norm", "rewards/chosen", "rewards/margins", "logps/chosen", "entropy"):
            assert float(ours[name]) == pytest.approx(float(theirs[name]), rel=2e-3, abs=1e-5), name


def test_lora_on_the_head_trains_where_trl_lets_it(tmp_path):
    config = LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False)
    policy = get_peft_model(tiny.llama(), config)
    kwargs = {"train_dataset": pairs(), "processing_class": tiny.tokenizer()}
    if Version("1.15") <= TRL:
        with pytest.raises(ValueError, match="Applying a PEFT adapter to `lm_head` is not supported"):  # TRL's own
            NaPOTrainer(policy, tiny.llama(), arguments(NaPOConfig, tmp_path), **kwargs)
        return
    trainer = NaPOTrainer(policy, tiny.llama(), arguments(NaPOConfig, tmp_path), **kwargs)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.compute_loss(trainer.model, batch).backward()
    ours = gradients(trainer.model)
    assert len(ours) == 2
    trainer.model.zero_grad()
    policy = logps_by_hand(trainer.model, batch).pairs(3)
    with torch.no_grad():
        reference = logps_by_hand(trainer.ref_model, batch).pairs(3)
    napo_loss(*policy, *reference, recipe=trainer.recipe).losses.mean().backward()
    for name, grad in gradients(trainer.model).items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-3, atol=2e-6, msg=name)


def test_encoder_decoders_are_refused_by_name(tmp_path):
    size = {"vocab_size": 32, "d_model": 16, "decoder_start_token_id": 0}
    t5 = T5ForConditionalGeneration(T5Config(d_ff=16, d_kv=8, num_layers=1, num_heads=2, **size))
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_layers": 1, "decoder_layers": 1}
    bart = BartForConditionalGeneration(
        BartConfig(encoder_ffn_dim=16, decoder_ffn_dim=16, forced_eos_token_id=None, **heads, **size)
    )
    for model in (t5, bart):
        with pytest.raises(TypeError, match=rf"decoder-only models; {type(model).__name__} is an encoder-decoder"):
            NaPOTrainer(
                model, args=arguments(NaPOConfig, tmp_path), train_dataset=pairs(), processing_class=tiny.tokenizer()
            )


def test_a_reference_with_an_adapter_of_its_own_keeps_it(tmp_path):
    ref = get_peft_model(tiny.llama(), LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False))
    trainer = NaPOTrainer(
        tiny.llama(), ref, arguments(NaPOConfig, tmp_path), train_dataset=pairs(), processing_class=tiny.tokenizer()
    )
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        expected = logps_by_hand(ref, batch).sum
        plain = logps_by_hand(tiny.llama(), batch).sum
    torch.testing.assert_close(trainer.reference_logps(batch).double(), expected, rtol=1e-5, atol=1e-5)
    assert (expected - plain).abs().max() > 1e-2


def test_the_reference_is_no_part_of_the_graph(tmp_path):
    trainer = trainer_for("text", tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    assert not trainer.reference_logps(batch).requires_grad
    trainer.compute_loss(trainer.model, batch).backward()
    assert all(p.grad is None for p in trainer.ref_model.parameters())

"""What a model does to its logits is read off and verified, or refused by name: nothing is silently wrong."""

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

import tiny
from napo_loss import fused_head
from napo_loss.hf import fusion
from napo_loss.hf.processing import Processing, ramp, solve
from napo_loss.reference import sequence_logps as oracle

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IDS = torch.randint(4, 20, (2, 8), generator=torch.Generator().manual_seed(0))


def shaped(raw, scale, cap):
    """As models write it, in the dtype of their logits."""
    y = raw * scale
    return y if cap is None else torch.tanh(y / cap) * cap


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", [14, 40, 1000])
@pytest.mark.parametrize("cap", [None, 30.0, 50.0, 7.5, 0.5])
@pytest.mark.parametrize(
    ("scale", "config"), [(1.0, {}), (0.0625, {"a": 0.0625}), (1 / 6, {"b": {"c": 6.0}}), (2.5, {"d": 2.5})]
)
def test_scale_and_softcap_are_read_off(scale, config, cap, V, dtype):
    shown = ramp(V, torch.empty((), dtype=dtype))
    seen = shaped(shown, scale, cap).expand(3, 1, V)
    numbers = config | {"cap": cap, "hidden_size": 64, "dropout": 0.1, "tied": True, "eos": [1, 2], "eps": 1e-6}
    found = solve(shown, seen, numbers, "Model")
    assert found.softcap == cap
    assert (found.logit_scale or 1.0) == pytest.approx(scale, rel=1e-12)


def test_a_scale_that_no_config_has_is_read_in_full_precision_and_refused_in_half():
    shown = ramp(50, torch.empty(()))
    assert solve(shown, shown * 0.7, {}, "Model").logit_scale == pytest.approx(0.7, rel=1e-6)
    half = shown.bfloat16()
    with pytest.raises(NotImplementedError, match="what Model does to its logits"):
        solve(half, half * 0.7, {}, "Model")


def masked(x):
    return x.index_fill(-1, torch.tensor([3, 5]), torch.finfo(x.dtype).min)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (masked, r"2 of 50 .*in column 3 it makes -3.4"),
        (lambda x: x.index_fill(-1, torch.tensor([7]), -torch.inf), r"1 of 50 .*in column 7 it makes -inf"),
        (lambda x: x + torch.nn.functional.one_hot(torch.tensor(9), 50), r"1 of 50 .*in column 9"),
        (lambda x: x.roll(1, -1), "of 50 are not explained"),
        (lambda x: x * x, "of 50 are not explained"),
        (lambda x: x * torch.tensor([1.0, 2.0])[:, None], "of 50 are not explained"),
        (lambda x: x[..., :-2], r"50 rows, logits of shape \[2, 48\]"),
    ],
    ids=["mask", "-inf", "bias", "order", "square", "by row", "cut"],
)
def test_anything_else_is_refused_with_what_was_seen(change, message):
    shown = ramp(50, torch.empty(()))
    with pytest.raises(NotImplementedError, match=message):
        solve(shown, change(shown.expand(2, 50)), {"a": 2.0}, "Model")


def test_processing_is_what_the_operator_computes():
    x = torch.linspace(-50, 50, 20, dtype=torch.float64)
    torch.testing.assert_close(Processing(0.5, 7.0)(x), shaped(x, 0.5, 7.0))
    torch.testing.assert_close(Processing()(x), x)


def louder(model, by=6):
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(by)
    return model.eval()


def compare(model, **inputs):
    right = oracle(model(input_ids=IDS, **inputs).logits.double(), IDS).sum.float()
    with fused_head(model):
        got = model(input_ids=IDS, labels=IDS, **inputs).sum
    return got, right


SIZE = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}  # fmt: skip


@pytest.mark.parametrize("text", ["gemma2", "granite"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_vision_model_that_ignores_what_its_text_config_says(text, dtype):
    """LLaVA has a head of its own and does nothing to its logits, whatever its text model would do."""
    torch.manual_seed(0)
    if text == "gemma2":
        config = Gemma2Config(**SIZE, head_dim=8, final_logit_softcapping=2.0)
    else:
        config = GraniteConfig(**SIZE, logits_scaling=4.0)
    vision = tiny.llava().config.vision_config
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=config, image_token_index=3))
    got, right = compare(louder(model).to(dtype))
    torch.testing.assert_close(got, right, **({} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 0.3}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_softcap_of_which_real_logits_say_little_is_read_off(dtype):
    """Logits of an untrained model are so small that a cap of 30 is below their rounding; later ones are not."""
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(**SIZE, head_dim=8, final_logit_softcapping=30.0)).to(dtype).eval()
    compare(model)
    got, right = compare(louder(model, 20))
    torch.testing.assert_close(got, right, **({} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 0.3}))


def test_a_softcap_under_another_name():
    torch.manual_seed(0)
    model = RecurrentGemmaForCausalLM(RecurrentGemmaConfig(**SIZE | {"num_hidden_layers": 3}, lru_width=16))
    torch.testing.assert_close(*compare(louder(model, 12)))


class Doubled(LlamaForCausalLM):
    """Its logits are its own affair."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 2 + 1  # a common offset is nothing to a softmax, but a surprise
        return out


def test_subclasses_and_hooks_that_change_the_logits_are_caught():
    torch.manual_seed(0)
    with (
        fused_head(model := Doubled(tiny.text_config())),
        pytest.raises(NotImplementedError, match="what Doubled does"),
    ):
        model(input_ids=IDS, labels=IDS)
    assert hasattr(model(input_ids=IDS), "logits")

    model = tiny.llama()
    torch.testing.assert_close(*compare(model))
    handle = model.lm_head.register_forward_hook(lambda module, args, output: output * 1.5)  # after the first call
    with (
        fused_head(model),
        pytest.raises(NotImplementedError, match="logits of LlamaForCausalLM: of one of its positions"),
    ):
        model(input_ids=IDS, labels=IDS)
    handle.remove()
    torch.testing.assert_close(*compare(model))
    model.register_forward_hook(lambda module, args, output: setattr(output, "logits", output.logits.flip(-1)))
    with fused_head(model), pytest.raises(NotImplementedError, match="of one of its positions"):
        model(input_ids=IDS, labels=IDS)


class InPlace(LlamaForCausalLM):
    """A cap of its own, written over the logits that its head returned."""

    def forward(self, input_ids, **kwargs):
        out = self.model(input_ids=input_ids)
        logits = self.lm_head(out.last_hidden_state).div_(4.0)
        return CausalLMOutputWithPast(logits=4.0 * logits.tanh())


def test_a_model_that_writes_over_its_logits():
    torch.manual_seed(0)
    model = louder(InPlace(tiny.text_config(cap=4.0)))
    got, right = compare(model)
    torch.testing.assert_close(got, right)
    grads = [torch.autograd.grad(x.sum(), model.lm_head.weight)[0] for x in (got, right)]
    torch.testing.assert_close(*grads)


def test_where_a_log_prob_is_infinite_nothing_is_compared():
    logits = torch.tensor([[0.0, 1.0, -torch.inf]])
    columns = torch.tensor([[0, 2]])
    ours = logits.log_softmax(-1).gather(-1, columns)
    finite, right = torch.zeros(1, 2), logits[:, :2]
    assert not fusion.check(finite, logits, columns, torch.float32, "Model")
    assert not fusion.check(ours, right, torch.tensor([[0, 1]]), torch.float32, "Model")
    assert fusion.check(right.log_softmax(-1), right, torch.tensor([[0, 1]]), torch.float32, "Model")


def test_what_a_model_does_is_verified_once(monkeypatch):
    seen = []
    original = fusion.check
    monkeypatch.setattr(fusion, "check", lambda *args: seen.append(1) or original(*args))
    model = tiny.llama()
    for _ in range(3):
        compare(model)
    assert len(seen) == 1


def test_nan_in_the_first_batch_is_nan_and_verified_later():
    model = tiny.llama()
    weight = model.lm_head.weight.detach().clone()
    with fused_head(model):
        with torch.no_grad():
            model.lm_head.weight.fill_(torch.nan)
        assert model(input_ids=IDS, labels=IDS).sum.isnan().all()
        with torch.no_grad():
            model.lm_head.weight.copy_(weight)
        assert model(input_ids=IDS, labels=IDS).sum.isfinite().all()


class Twice(LlamaForCausalLM):
    def forward(self, input_ids=None, **kwargs):
        hidden = self.model(input_ids).last_hidden_state
        return (self.lm_head(hidden) + self.lm_head(hidden),)


class Never(LlamaForCausalLM):
    def forward(self, input_ids=None, **kwargs):
        return (self.model(input_ids).last_hidden_state @ self.lm_head.weight.T,)


class Flat(LlamaForCausalLM):
    def forward(self, input_ids=None, **kwargs):
        return (self.lm_head(self.model(input_ids).last_hidden_state.flatten(0, 1)),)


@pytest.mark.parametrize(
    ("cls", "message"),
    [(Twice, "Twice calls its output projection more than once"), (Never, "Never does not call its output projection"),
     (Flat, r"Flat calls .* with hidden states of shape \[16, 32\], beside labels of shape \[2, 8\]")],
)  # fmt: skip
def test_forwards_that_use_their_head_otherwise_are_named(cls, message):
    model = cls(tiny.text_config())
    with fused_head(model), pytest.raises(NotImplementedError, match=message):
        model(input_ids=IDS, labels=IDS)
    assert model(input_ids=IDS)[0].shape[-1] == model.config.vocab_size


@pytest.mark.parametrize(
    ("given", "message"),
    [({"labels": IDS[0]}, r"labels must be a tensor of shape \[N, T\], got shape \[8\]"),
     ({"labels": IDS.tolist()}, "labels must be a tensor .* got list"),
     ({"labels": IDS, "token_weights": torch.ones(2, 7)}, r"token_weights must have .* \[2, 8\], got \[2, 7\]")],
)  # fmt: skip
def test_labels_and_weights_are_checked_before_the_model_runs(given, message):
    model = tiny.llama()
    model.model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with fused_head(model), pytest.raises(ValueError, match=message):
        model(input_ids=IDS, **given)

"""Every language model of transformers in ``fused_head``, and the page that says what was found."""

from contextlib import contextmanager

import pytest
import torch
import transformers

import zoo
import zoo_inputs
import zoo_settings
from draws import quick
from napo_loss import SequenceLogps

pytestmark = pytest.mark.filterwarnings("ignore")  # what models of all years warn of
SPECIMENS = zoo.specimens()
PAGE = zoo.PAGE.read_text()
OF_THIS_VERSION = f"of transformers {transformers.__version__}:" in PAGE
QUICK = {  # plain, softcapped, scaled, with bias, with images, over a text model whose scale it ignores, and refused
    "LlamaForCausalLM", "Gemma2ForCausalLM", "GraniteForCausalLM", "GPTJForCausalLM", "Qwen2VLForConditionalGeneration",
    "MllamaForConditionalGeneration", "LLaVA-NeXT over Granite", "BartForConditionalGeneration",
    "ChameleonForConditionalGeneration",
}  # fmt: skip


@pytest.mark.parametrize("name", quick(QUICK, SPECIMENS))
def test_log_probs_and_gradients_are_the_models_own_or_it_is_refused_by_name(name):
    line = zoo.row(name, SPECIMENS[name], zoo.examine(SPECIMENS[name]))
    assert line in PAGE.splitlines() or not OF_THIS_VERSION, "python tests/zoo.py makes docs/models.md anew"


@pytest.mark.skipif(not OF_THIS_VERSION, reason="the page is of another version of transformers")
def test_the_page_is_what_the_command_makes():
    """Its lines are found again above."""
    lines = zoo.rows(PAGE)
    assert zoo.render(lines) == PAGE
    assert [line.split(" | ")[0].strip("| ").split(" (`")[0].strip("`") for line in lines] == list(SPECIMENS)


def test_almost_every_class_is_built():
    found = [line for line in zoo.rows(PAGE) if "not built" in line]
    assert len(found) <= 3


def from_logits(wrong):
    """A stand-in for ``fused_head`` that takes log-probs from the model's own logits, changed by ``wrong``."""

    @contextmanager
    def head(model):
        def forward(*args, labels=None, **kwargs):
            if labels is None:
                return own(*args, **kwargs)
            return SequenceLogps(zoo.reference(wrong(model, own(*args, **kwargs).logits), labels), lengths(labels))

        own, model.forward = model.forward, forward
        yield model
        model.forward = own

    return head


def lengths(labels):
    return (labels[:, 1:] >= 0).sum(1)


def without_gradient_of(name):
    def wrong(model, logits):
        if logits.requires_grad:
            bias = model.lm_head.bias
            logits = logits - (bias if name == "bias" else 0) + (bias.detach() if name == "bias" else 0)
            logits = logits.detach() if name == "all" else logits
        return logits + 0 * model.lm_head.weight.sum()

    return wrong


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda model, logits: logits, None),
        (lambda model, logits: logits * 1.001, "not close"),
        (lambda model, logits: 30 * torch.tanh(logits / 30), "not close"),
        (lambda model, logits: logits - model.lm_head.bias, "not close"),
        (lambda model, logits: logits.roll(1, 0), "not close"),
        (without_gradient_of("bias"), "gradient of lm_head.bias"),
        (without_gradient_of("all"), "gradient of"),
    ],
    ids=["right", "scale", "softcap", "bias", "rows", "gradient of the bias", "no gradient"],
)
def test_the_comparison_notices(wrong, message, monkeypatch):
    monkeypatch.setattr(zoo, "fused_head", from_logits(wrong))
    model = zoo.build(SPECIMENS["GPTJForCausalLM"])
    inputs = zoo_inputs.text(model)
    if message is None:
        zoo.compare(model, inputs)
    else:
        with pytest.raises(AssertionError, match=message):
            zoo.compare(model, inputs)


def test_a_refusal_without_a_name_is_none(monkeypatch):
    def refuse(model, logits):
        raise NotImplementedError("some model")

    monkeypatch.setattr(zoo, "fused_head", from_logits(refuse))
    with pytest.raises(NotImplementedError, match="some model"):
        zoo.examine(SPECIMENS["LlamaForCausalLM"])


@pytest.mark.parametrize("token", [10, 12, 15, 22])
def test_a_model_that_writes_into_its_logits_is_refused_whichever_it_hides(token, monkeypatch):
    names = {"<image>": 3, "IMGIMGAZ": token}
    monkeypatch.setitem(zoo_settings.OTHER, "ChameleonConfig", {"vocabulary_map": names})
    model = zoo.build(SPECIMENS["ChameleonForConditionalGeneration"])
    with pytest.raises(NotImplementedError, match=f"1 of 64 are not explained .*in column {token} "):
        zoo.compare(model, zoo_inputs.text(model))

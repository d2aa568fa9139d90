"""The zoo: every class of transformers' language models built small, and ``fused_head`` compared with its own logits.

``python tests/zoo.py`` writes docs/models.md; with words behind, it prints what is found of those whose name holds one.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

import zoo_configs
import zoo_inputs
from napo_loss import fused_head

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
MAPPINGS = {
    "CAUSAL_LM": "causal", "IMAGE_TEXT_TO_TEXT": "image-text", "MULTIMODAL_LM": "multimodal",
    "SEQ_TO_SEQ_CAUSAL_LM": "seq2seq",
}  # fmt: skip
LARGEST = 1_000_000  # parameters
OF_CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "BLIP-2 over T5": ("Blip2ForConditionalGeneration", {"text_config": {"model_type": "t5"}}),
    "Gemma 2 without softcap": ("Gemma2ForCausalLM", {"final_logit_softcapping": None}),
    "Inkling whose vocabulary is not cut": ("InklingForCausalLM", {"unpadded_vocab_size": None}),
    "InstructBLIP over T5": ("InstructBlipForConditionalGeneration", {"text_config": {"model_type": "t5"}}),
    "Llama with tied weights": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "InstructBLIP-Video over T5": ("InstructBlipVideoForConditionalGeneration", {"text_config": {"model_type": "t5"}}),
    "LLaVA over Gemma 2": ("LlavaForConditionalGeneration", {"text_config": {"model_type": "gemma2"}}),
    "LLaVA-NeXT over Granite": ("LlavaNextForConditionalGeneration", {"text_config": {"model_type": "granite"}}),
    "Mixtral with router logits": ("MixtralForCausalLM", {"output_router_logits": True}),
    "PaliGemma 2": ("PaliGemmaForConditionalGeneration", {"text_config": {"model_type": "gemma2"}}),
    "Reformer with a head in chunks": ("ReformerModelWithLMHead", {"chunk_size_lm_head": 4}),
}
"""Other configs than the smallest of their class."""
TRAINED = {"ReformerModelWithLMHead", "RwkvForCausalLM"}  # cannot be differentiated in eval mode


class Specimen(NamedTuple):
    cls: str
    mappings: list[str]
    settings: dict[str, Any]


class Verdict(NamedTuple):
    kind: str  # "equal", "refused" or "not built"
    reason: str = ""
    image: bool = False


def specimens() -> dict[str, Specimen]:
    """The classes of the mappings, and ``OF_CLASSES``, by name."""
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    found: dict[str, Specimen] = {}
    for mapping, short in MAPPINGS.items():
        for name in getattr(auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").values():
            mappings = found.setdefault(name, Specimen(name, [], {})).mappings
            mappings.extend({short} - {*mappings})
    for name, (cls, settings) in OF_CLASSES.items():
        found[name] = Specimen(cls, found[cls].mappings, settings)
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def build(specimen: Specimen) -> nn.Module:
    cls = getattr(transformers, specimen.cls)
    config = zoo_configs.small(cls.config_class, **specimen.settings)
    if "causal" in specimen.mappings and hasattr(config, "is_decoder"):
        config.is_decoder = True  # BERT and its kin look ahead otherwise
    with torch.device("meta"):
        size = sum(p.numel() for p in cls(config).parameters())
    assert size < LARGEST, f"{size} parameters, more than {LARGEST}"
    torch.manual_seed(0)
    return louder(cls(config).eval())


def louder(model: nn.Module) -> nn.Module:
    """Weights so large that differences show, and no bias, gate or norm that could be left out unnoticed."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=draw)
            p.copy_(4 * p + 0.05 * noise if p.dim() > 1 else p + 0.2 * noise)
    return model


def reference(logits: Tensor, labels: Tensor) -> Tensor:
    """Sums [N] of the float64 log-probs of the labels."""
    assert logits.shape[:2] == labels.shape
    logps = logits[:, :-1].double().log_softmax(-1)
    labels = labels[:, 1:]
    return logps.gather(-1, labels.clamp_min(0)[..., None])[..., 0].masked_fill(labels < 0, 0).sum(1)


def gradients(model: nn.Module, sums: Tensor) -> dict[str, Tensor]:
    """Of a weighted sum over the sequences, for every parameter that is trained; zeros for one that takes no part."""
    weights = torch.tensor([1.0, -0.7, 0.4, 3.0], dtype=sums.dtype)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad((weights * sums).sum(), list(named.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), found, strict=True)}


def compare(model: nn.Module, inputs: dict[str, Any], differentiate: bool = True) -> None:
    """Raises AssertionError where log-probs or gradients in ``fused_head`` are not those of the model's own logits."""
    inputs = dict(inputs)
    labels = inputs.pop("labels")
    with torch.set_grad_enabled(differentiate):
        with fused_head(model):
            found = model(**inputs, labels=labels)
        expected = reference(model(**inputs).logits, labels)
    torch.testing.assert_close(found.sum.double(), expected, rtol=1e-5, atol=1e-4)
    assert found.length.tolist() == (labels[:, 1:] >= 0).sum(1).tolist()
    if not differentiate:
        return
    right, fused = gradients(model, expected), gradients(model, found.sum)
    largest = max(g.abs().max() for g in right.values())
    assert largest > 1e-3, "gradients too small to say anything"
    for name, grad in right.items():
        off = (fused[name] - grad).abs().max()
        assert off <= 1e-4 * grad.abs().max() + 1e-6 * largest, f"gradient of {name}: {off} of {grad.abs().max()}"


def image_matters(model: nn.Module, inputs: dict[str, Any]) -> bool:
    """Whether another image makes other log-probs."""
    inputs = dict(inputs)
    labels = inputs.pop("labels")
    other = {k: -x if "pixel_values" in k else x.flip(0) if k == "flattened_patches" else x for k, x in inputs.items()}
    with torch.no_grad():
        a, b = (reference(model(**given).logits, labels) for given in (inputs, other))
    return bool(((a - b).abs()[:3] > 1e-5).all())


def examine(specimen: Specimen) -> Verdict:
    """Raises AssertionError where something differs, and what a model raises that is no refusal by name."""
    transformers.utils.logging.set_verbosity_error()
    try:
        model = build(specimen)
    except Exception as error:
        return Verdict("not built", f"{type(error).__name__}: {error}")
    inputs = None
    try:
        with fused_head(model):
            pass  # some are refused at the door
        inputs = zoo_inputs.pictured(model) or zoo_inputs.text(model)
        compare(model, inputs, differentiate=specimen.cls not in TRAINED)
        compare(model.train(), inputs)
    except (NotImplementedError, TypeError) as error:
        if specimen.cls not in str(error):
            raise
        return Verdict("refused", str(error))
    image = zoo_inputs.takes_images(model)
    assert not image or image_matters(model.eval(), inputs)
    return Verdict("equal", image=image)


def row(name: str, specimen: Specimen, verdict: Verdict) -> str:
    """A line of the page's table; of a message its first sentence, without numbers that rounding may change."""
    title = f"`{name}`" if name == specimen.cls else f"{name} (`{specimen.cls}`)"
    reason = " ".join(verdict.reason.split()).split(". ")[0].split(": use ")[0].replace("|", "\\|")
    reason = re.sub(r"-?\d+\.\d+(e[+-]\d+)?", "…", reason)
    found = f"{verdict.kind}: {reason}" if reason else verdict.kind
    return f"| {title} | {', '.join(specimen.mappings)} | {'yes' if verdict.image else ''} | {found} |"


def rows(page: str) -> list[str]:
    return re.findall(r"^\| [`\w].*`.*\|$", page, re.MULTILINE)


def render(table: Iterable[str]) -> str:
    table = list(table)
    kinds = Counter(line.split(" | ")[3].removesuffix(" |").split(":")[0] for line in table)
    images = sum(line.split(" | ")[2] == "yes" for line in table)
    return f"""# Models

What [`fused_head`](logps.md) does with the language models of transformers {transformers.__version__}: every class of
its mappings for causal, image-text-to-text, multimodal and sequence-to-sequence language models, and some of them in
other configs. This page is made by `python tests/zoo.py`, and `make test-all` finds each line again.

Each is built small from its config, with random weights. "Equal" means that the log-probs of four sequences (padded
left, padded right, with masked prompts, one masked altogether) are those of a float64 log-softmax of the model's own
logits, and that every trained parameter has the same gradient, the vision tower's included, in eval and in train mode
(those of Reformer and RWKV in train mode alone: they cannot be differentiated in the other). "Refused" means an error
that names the class, and no number. Each sequence has an image, as the model's own inputs, where the third column says
so; audio is left out.

**{kinds["equal"]} equal ({images} with an image), {kinds["refused"]} refused, {kinds["not built"]} not built.**

| class | mappings | image | found |
|---|---|---|---|
""" + "".join(f"{line}\n" for line in table)


def main(words: list[str]) -> None:
    lines = []
    for name, specimen in specimens().items():
        if not words or any(word.lower() in f"{name} {specimen.cls}".lower() for word in words):
            lines.append(row(name, specimen, examine(specimen)))
            print(lines[-1], flush=True)
    if not words:
        PAGE.write_text(render(lines))


if __name__ == "__main__":
    main(sys.argv[1:])

"""The shapes that the suites run: heads of real models by name, and how much of them this machine can afford.

A micro-batch of ``B`` pairs is ``N = 2·B`` sequences. The share ``c`` of positions that count follows a masked,
contiguous prompt; with an image it follows from the model's image tokens.
"""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.measure import GPU

ACTIVE = (0.05, 0.1, 0.3, 1.0)


class Model(NamedTuple):
    D: int
    V: int
    image_tokens: int = 0


MODELS = {
    "Llama-3-8B": Model(4096, 128256),
    "Qwen2.5-VL-7B": Model(3584, 152064),
    "Gemma-2-2B": Model(2304, 256000),  # without its softcap, which half of the peers do not know
    "LLaVA-1.5-7B": Model(4096, 32064, 576),
    "SmolLM2-135M": Model(576, 49152),
    "toy": Model(64, 1000),
}
TEXT, ANSWER = 64, 128
"""Tokens of the question beside the image, and of the answer."""


class Shape(NamedTuple):
    name: str
    N: int
    T: int
    D: int
    V: int
    active: tuple[float, ...]  # the values of c to measure


def shape(model: str, B: int, T: int, *active: float) -> Shape:
    D, V, _ = MODELS[model]
    return Shape(model, 2 * B, T, D, V, active or ACTIVE)


def with_image(model: str, B: int) -> Shape:
    D, V, image = MODELS[model]
    T = image + TEXT + ANSWER
    return Shape(f"{model}, one image", 2 * B, T, D, V, (round(ANSWER / T, 3),))


def shapes_of_a_gpu() -> list[Shape]:
    return [
        shape("Llama-3-8B", 8, 1024),
        shape("Llama-3-8B", 1, 1024),
        with_image("LLaVA-1.5-7B", 1),
        shape("Qwen2.5-VL-7B", 4, 1024, 0.1),
        shape("Gemma-2-2B", 4, 1024, 0.3),
        *(shape("Llama-3-8B", 8, T, 0.3) for T in (256, 512, 2048)),
    ]


def logits_shapes(quick: bool) -> list[Shape]:
    """The first is shown in full; those that differ from it in T alone are the figure's sweep."""
    if quick:
        return [shape("Llama-3-8B", 8, 512, 0.1) if GPU else shape("toy", 2, 64, 0.3)]
    if GPU:
        return [*shapes_of_a_gpu(), shape("LLaVA-1.5-7B", 8, 1024)]
    return [  # the vocabularies are real; T is what two cores can do
        shape("Llama-3-8B", 1, 128),
        shape("LLaVA-1.5-7B", 8, 64),
        with_image("LLaVA-1.5-7B", 1),
        shape("Qwen2.5-VL-7B", 1, 128, 0.3),
        shape("Gemma-2-2B", 1, 128, 0.3),
        *(shape("Llama-3-8B", 1, T, 0.3) for T in (32, 64)),
    ]


def linear_shapes(quick: bool) -> list[Shape]:
    """As :func:`logits_shapes`. On a CPU a small model's head stands in for the large ones."""
    if quick:
        return [shape("Llama-3-8B", 4, 512, 0.3) if GPU else shape("toy", 2, 32, 0.3)]
    if GPU:
        return shapes_of_a_gpu()
    return [shape("SmolLM2-135M", 1, 192), *(shape("SmolLM2-135M", 1, T, 0.3) for T in (48, 96))]


def linear_accuracy_shape(quick: bool) -> Shape:
    """400 tokens a sequence, all of them active: what a sum of log-probs loses to rounding."""
    if quick:
        return Shape("toy", 4, 33, 64, 1000, (1.0,))
    return shape("Llama-3-8B" if GPU else "SmolLM2-135M", 1, 401, 1.0)

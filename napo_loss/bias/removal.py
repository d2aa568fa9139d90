"""What :mod:`napo_loss.bias` takes away: the information in an image, the image itself, or the question."""

from __future__ import annotations

import re
from typing import Any

import numpy as np


def remove_image(image: Any, mode: str, rng: np.random.Generator, crop_area: tuple[float, float] = (0.01, 0.2)) -> Any:
    """A PIL image of the same size and mode with its information removed, see :func:`add_biased_negatives`."""
    from PIL import Image

    if mode == "crop":
        share = rng.uniform(*crop_area)
        ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))  # sides as in the usual random-resized crop
        width = min(image.width, max(1, round(np.sqrt(image.width * image.height * share * ratio))))
        height = min(image.height, max(1, round(np.sqrt(image.width * image.height * share / ratio))))
        left, top = rng.integers(image.width - width + 1), rng.integers(image.height - height + 1)
        return image.resize(image.size, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
    pixels = np.asarray(image)
    if mode == "noise":
        pixels = rng.integers(0, 256, pixels.shape, dtype=np.uint8)
    elif mode == "mask":
        pixels = np.broadcast_to(pixels.mean((0, 1)).round().astype(np.uint8), pixels.shape)
    else:
        pixels = np.zeros(pixels.shape, np.uint8)
    return Image.fromarray(np.ascontiguousarray(pixels), image.mode)


def images_of(row: dict[str, Any], index: int) -> list[Any]:
    from PIL import Image

    images = row["images"] if "images" in row else [row["image"]]
    if not images or any(not isinstance(x, Image.Image) for x in images):
        raise TypeError(f"row {index} of dataset needs PIL images (the Image feature of datasets), got {images!r}")
    return [x if x.mode in ("RGB", "L") else x.convert("RGB") for x in images]


def conversation(
    prompt: list[dict[str, Any]], n_images: int, instruction: str | None, *, question: bool = True, image: bool = True
) -> list[dict[str, Any]]:
    """The conversation as lists of parts, with one placeholder per image.

    Without ``question`` every user turn holds the ``instruction``, or no text where that is ``None``; without
    ``image`` no turn holds a placeholder.
    """
    messages = []
    for message in prompt:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        # Arrow gives every part the keys of all parts, filled with None.
        parts = [{k: v for k, v in part.items() if v is not None} for part in parts]
        if not question and message["role"] == "user":
            parts = [part for part in parts if part["type"] != "text"]
            parts += [] if instruction is None else [{"type": "text", "text": instruction}]
        messages.append({**message, "content": parts})
    found = sum(part["type"] == "image" for message in messages for part in message["content"])
    if found == 0:
        first = next((m for m in messages if m["role"] == "user"), None)
        if first is None:
            raise ValueError("a conversational prompt needs a user turn to carry its images")
        first["content"] = [{"type": "image"}] * n_images + first["content"]
    elif found != n_images:
        raise ValueError(f"a conversational prompt has {found} image parts for {n_images} images")
    if not image:
        messages = [{**m, "content": [part for part in m["content"] if part["type"] != "image"]} for m in messages]
    return messages


def neutral_text(question: str, token: str, instruction: str | None) -> str:
    """``instruction`` in place of the first text between the placeholders, and nothing in place of the others."""
    pieces, written = re.split(f"({re.escape(token)})", question), instruction is None
    for k, piece in enumerate(pieces):
        if piece != token and piece.strip():
            before, after = piece[: len(piece) - len(piece.lstrip())], piece[len(piece.rstrip()) :]
            pieces[k] = before + ("" if written else instruction or "") + after
            written = True
    return "".join(pieces) + ("" if written else instruction or "")


def without_placeholders(prompt: str, token: str) -> str:
    """A plain-text prompt without its image placeholders, the tokens that wrap them, and the white space after them.

    Example:
        >>> without_placeholders("USER: <image>\\nWhat is it? ASSISTANT:", "<image>")
        'USER: What is it? ASSISTANT:'
        >>> without_placeholders("<|vision_start|><|image_pad|><|vision_end|>What is it?", "<|image_pad|>")
        'What is it?'
    """
    wrap = r"(?:<[^<>\s]*(?:vision|image|img)[^<>\s]*>)?"
    return re.sub(rf"{wrap}{re.escape(token)}{wrap}\s*", "", prompt)

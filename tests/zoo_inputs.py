"""Inputs of a small model as its own forward names them: padded text and, where it takes images, one in each row."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from zoo_settings import BOTH, FIRST, LAST, D

N, T = 4, 12
SIDE, PATCH = 16, 4  # of an image and of its patches, in pixels
Inputs = dict[str, Any]


def text(model: nn.Module) -> Inputs:
    """A whole row with a hole in its labels, one padded right, one padded left, one all masked; prompts are masked."""
    ids = torch.randint(FIRST, LAST, (N, T), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    mask[2, :2] = 0
    ids = ids.masked_fill(mask == 0, 0)
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :4] = -100
    labels[0, 6] = -100
    labels[3] = -100
    found = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return found | TEXT.get(type(model).__name__, lambda model: {})(model)


def takes_images(model: nn.Module) -> bool:
    cls = type(model).__name__
    return cls not in NO_LOOKS and (cls in LOOKS or "pixel_values" in parameters(model))


def pictured(model: nn.Module) -> Inputs | None:
    """The same with an image in each row, its placeholders in front; None for a model that takes no images."""
    if not takes_images(model):
        return None
    cls = type(model).__name__
    usual = grid if "image_grid_thw" in parameters(model) else square
    looks = LOOKS.get(cls, usual)(model)
    found = text(model)
    if cls in BESIDE:
        return found | looks
    token, places = looks.pop("token", None), looks.pop("places", None)
    token = model.config.image_token_id if token is None else token
    places = count(model, looks) if places is None else places
    for name, value in (("input_ids", token), ("attention_mask", 1), ("labels", -100)):
        filled = torch.full((places,), value)
        split = [(row[:s], filled, row[s:]) for s, row in zip((0, 0, 2, 0), found[name], strict=True)]
        found[name] = torch.stack([torch.cat(parts) for parts in split])
    there = found["input_ids"] == token
    for name in parameters(model) & {"mm_token_type_ids", "token_type_ids", "image_embeds_position_mask"}:
        found[name] = there.long()
    if "moe_mm_token_type_ids" in parameters(model):
        found["moe_mm_token_type_ids"] = there.int()
    return found | looks


def parameters(model: nn.Module) -> set[str]:
    return set(inspect.signature(type(model).forward).parameters)


def count(model: nn.Module, looks: Inputs) -> int:
    """Placeholders of one image: the features that the model makes of it."""
    with torch.no_grad():
        found = (model if hasattr(model, "get_image_features") else model.model).get_image_features(**looks)
    found = getattr(found, "pooler_output", found)
    return sum(x.shape[:-1].numel() for x in (found if isinstance(found, list | tuple) else [found])) // N


def pixels(*shape: int, rows: int = N) -> Tensor:
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(1))


def grid(model: nn.Module, *shape: int, name: str = "image_grid_thw") -> Inputs:
    """Patches of all images in one list, as Qwen-VL and its kin take them."""
    vision = model.config.vision_config
    frames = getattr(vision, "temporal_patch_size", None) or getattr(vision, "patch_temporal", 1)
    shape = shape or (3 * frames * PATCH * PATCH,)
    return {"pixel_values": pixels(*shape, rows=N * 16), name: torch.tensor([[1, 4, 4]] * N)}


def tiles(model: nn.Module) -> Inputs:
    """An image of two tiles, and a small one of the whole."""
    return {"pixel_values": pixels(3, 3, SIDE, SIDE), "image_sizes": torch.tensor([[SIDE, 2 * SIDE]] * N)}


def sized(model: nn.Module) -> Inputs:
    return {"pixel_values": pixels(3, SIDE, SIDE), "image_sizes": torch.tensor([[SIDE, SIDE]] * N)}


def square(model: nn.Module, **more: Any) -> Inputs:
    return {"pixel_values": pixels(3, SIDE, SIDE), **more}


def one_of_many(model: nn.Module, **more: Any) -> Inputs:
    return {"pixel_values": pixels(1, 3, SIDE, SIDE), **more}


def strip(model: nn.Module) -> Inputs:
    """The patches of all images in one row, and each image's shape in patches."""
    return {"pixel_values": pixels(3, PATCH, N * 16 * PATCH, rows=1), "target_sizes": torch.tensor([[4, 4]] * N)}


def rows_of_patches(model: nn.Module, width: int = 3 * PATCH * PATCH, **more: Any) -> Inputs:
    return {"pixel_values": pixels(16, width), **more}


ONES = torch.ones(N, dtype=torch.long)
SHAPE = torch.tensor([[4, 4]] * N)  # of each image, in patches
PLACES = torch.tensor([[x, y] for y in range(4) for x in range(4)]).repeat(N, 1, 1)  # of its patches, [N, 16, 2]
POOLED = torch.arange(N * 16).view(N, 2, 2, 2, 2).transpose(2, 3).reshape(N * 4, 4)  # four patches for each token
LOOKS: dict[str, Callable[[Any], Inputs]] = {
    "DeepseekVLHybridForConditionalGeneration": lambda m: square(m, high_res_pixel_values=pixels(3, SIDE, SIDE)),
    "Emu3ForConditionalGeneration": sized,
    "FuyuForCausalLM": lambda m: rows_of_patches(m, places=16),
    "Gemma4ForConditionalGeneration": lambda m: rows_of_patches(m, image_position_ids=PLACES),
    "Gemma4UnifiedForConditionalGeneration": lambda m: rows_of_patches(m, 192, image_position_ids=PLACES),
    "Granite4VisionForConditionalGeneration": lambda m: tiles(m) | {"places": 14},
    "GraniteDoclingForConditionalGeneration": lambda m: one_of_many(m, pixel_attention_mask=ONES[:, None] > 0),
    "Idefics2ForConditionalGeneration": one_of_many,
    "Idefics3ForConditionalGeneration": one_of_many,
    "IdeficsForVisionText2Text": lambda m: one_of_many(m, image_attention_mask=torch.ones(N, T, 1)),
    "Inkling2ForConditionalGeneration": lambda m: {
        "pixel_values": pixels(8, 8, 3, rows=4 * N), "image_grid_thw": torch.tensor([[1, 2, 2]] * N),
    },
    "InklingForConditionalGeneration": lambda m: {"pixel_values": pixels(2, PATCH, PATCH, 3, rows=4 * N)},
    "InstructBlipForConditionalGeneration": lambda m: square(m, qformer_input_ids=torch.full((N, 3), FIRST)),
    "InstructBlipVideoForConditionalGeneration": lambda m: {
        "pixel_values": pixels(2, 3, SIDE, SIDE), "qformer_input_ids": torch.full((N, 3), FIRST),
        "token": 4, "places": 8,
    },
    "Kimi_K25ForConditionalGeneration": lambda m: grid(m, 3, PATCH, PATCH),
    "Kosmos2ForConditionalGeneration": lambda m: square(m, token=FIRST - 1, places=4),
    "Kosmos2_5ForConditionalGeneration": lambda m: {
        "flattened_patches": torch.cat([PLACES, pixels(16, 48)], -1), "token": FIRST - 1, "places": 4,
    },
    "Lfm2VlForConditionalGeneration": lambda m: rows_of_patches(
        m, spatial_shapes=SHAPE, pixel_attention_mask=ONES[:, None].expand(N, 16)
    ),
    "LightOnOcrForConditionalGeneration": sized,
    "Llama4ForConditionalGeneration": lambda m: square(m, places=4),
    "LlavaNextForConditionalGeneration": tiles,
    "LlavaNextVideoForConditionalGeneration": tiles,
    "LlavaOnevisionForConditionalGeneration": tiles,
    "MiniCPMOcrForConditionalGeneration": strip,
    "MiniCPMV4_6ForConditionalGeneration": strip,
    "MiniCPMV4_7ForConditionalGeneration": strip,
    "Mistral3ForConditionalGeneration": sized,
    "MistralLarge4ForConditionalGeneration": sized,
    "MllamaForConditionalGeneration": lambda m: {
        "pixel_values": pixels(1, 4, 3, SIDE, SIDE), "aspect_ratio_ids": torch.full((N, 1), 6),
        "aspect_ratio_mask": ONES[:, None, None].expand(N, 1, 4), "cross_attention_mask": torch.ones(N, T, 1, 4),
    },
    "Molmo2ForConditionalGeneration": lambda m: rows_of_patches(
        m, image_token_pooling=POOLED, image_grids=torch.tensor([[2, 2, 0, 0]] * N), image_num_crops=ONES
    ),
    "NemotronH_Omni_Reasoning_V3": lambda m: {"pixel_values": pixels(48, rows=16 * N), "image_grid_hw": SHAPE},
    "PaddleOCRVLForConditionalGeneration": lambda m: grid(m, 3, PATCH, PATCH),
    "Phi4MultimodalForCausalLM": lambda m: {
        "image_pixel_values": pixels(2, 3, SIDE, SIDE), "image_sizes": torch.tensor([[SIDE, SIDE]] * N),
        "image_attention_mask": torch.ones(N, 2, 4, 4), "token": 3, "places": 13,
    },
    "SmolVLMForConditionalGeneration": one_of_many,
    "VideoLlama3ForConditionalGeneration": lambda m: grid(m) | {"image_merge_sizes": torch.full((N,), 2)},
}  # fmt: skip
BESIDE = {
    "BlipForConditionalGeneration", "GitForCausalLM", "IdeficsForVisionText2Text", "MllamaForConditionalGeneration",
}  # fmt: skip
"""Models whose images are attended to, or come first, so that no token stands for them."""
NO_LOOKS = {"FastVlmForConditionalGeneration", "PerceptionLMForConditionalGeneration"}
"""Models whose vision tower is timm's, and another one in the zoo."""
TEXT: dict[str, Callable[[Any], Inputs]] = {
    "BltForCausalLM": lambda m: {"use_cache": False},
    "EvollaForProteinText2Text": lambda m: {
        "protein_input_ids": torch.full((N, 3), FIRST), "protein_attention_mask": torch.ones(N, 3, dtype=torch.long),
    },
    "Gemma4UnifiedAssistantForCausalLM": lambda m: {
        "inputs_embeds": pixels(T, 2 * D),
        "shared_kv_states": dict.fromkeys(BOTH, (pixels(2, T, 8), pixels(2, T, 8))),
    },
    "KyutaiSpeechToTextForConditionalGeneration": lambda m: {
        "input_ids": torch.randint(1, 16, (N, T, 3), generator=torch.Generator().manual_seed(2)),
    },
    "VoxtralRealtimeForConditionalGeneration": lambda m: {"input_features": pixels(128, 8 * T), "num_delay_tokens": 2},
}  # fmt: skip

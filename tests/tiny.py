"""Models small enough for a test, built from configs: no hub, no weights to fetch."""

from __future__ import annotations

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

WORDS = "<pad> </s> <unk> <image> the a cat dog sat ran on mat road big small red blue what is this ? user assistant"
CHAT = (
    "{% for m in messages %}{{ m['role'] }} {% if m['content'] is string %}{{ m['content'] }} {% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }} {% endif %}{% endfor %}"
    "{% endif %}{% if m['role'] == 'assistant' %}</s> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate(WORDS.split())}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"}, chat_template=CHAT,
    )  # fmt: skip


def processor() -> LlavaProcessor:
    from transformers import CLIPImageProcessorPil  # which older versions lack

    images = CLIPImageProcessorPil(size={"height": 8, "width": 8}, do_center_crop=False)
    return LlavaProcessor(
        images, tokenizer(), patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=CHAT,
    )  # fmt: skip


def text_config(**kwargs) -> LlamaConfig:
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    return LlamaConfig(vocab_size=len(WORDS.split()), max_position_embeddings=128, **size, **tokens, **kwargs)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(text_config()).eval()


def llava() -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = CLIPVisionConfig(image_size=8, patch_size=4, projection_dim=16, **size)
    config = LlavaConfig(vision_config=vision, text_config=text_config(), image_token_index=3, pad_token_id=0)
    return LlavaForConditionalGeneration(config).eval()


def text_pairs(n: int = 6) -> Dataset:
    columns = {
        "prompt": ["the cat", "a dog ran", "the"],
        "chosen": [" sat on the mat", " on the road", " big dog"],
        "rejected": [" ran", " sat mat a a", " road road road"],
        "question_only": [" dog", " red", " blue mat"],
        "image_only": [" mat", " mat mat", " cat"],
    }
    return Dataset.from_dict({name: [values[i % 3] for i in range(n)] for name, values in columns.items()})


def vision_pairs(n: int = 4) -> Dataset:
    draw = np.random.default_rng(0)
    user = [[{"role": "user", "content": f"what is this {word} ?"}] for word in ("cat", "dog")]
    answer = [[{"role": "assistant", "content": word}] for word in ("big cat", "red dog on mat", "a mat", "blue")]
    rows = {
        "images": [[Image.fromarray(draw.integers(0, 255, (8, 8, 3), dtype=np.uint8))] for _ in range(n)],
        "prompt": [user[i % 2] for i in range(n)],
        **{
            name: [answer[(i + k) % 4] for i in range(n)]
            for k, name in enumerate(("chosen", "rejected", "question_only", "image_only"))
        },
    }
    return Dataset.from_dict(rows)

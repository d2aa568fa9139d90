"""A small config of any class of transformers."""

from __future__ import annotations

import copy
import dataclasses
import re
from typing import Any

from transformers import PreTrainedConfig

from zoo_settings import FLOATS, OTHER, ROPE, RULES, UNSET

BASE = {field.name for field in dataclasses.fields(PreTrainedConfig)}
PATTERNS = [(re.compile(pattern), value) for pattern, value in RULES]


def small(cls: type[PreTrainedConfig], **given: Any) -> PreTrainedConfig:
    """A config of this class with sizes by ``RULES``, then by ``OTHER``, then as given (nested configs as dicts)."""
    settings = {field.name: value for field in dataclasses.fields(cls) if (value := rule(field)) is not None}
    if "kv_lora_rank" in settings:  # latent attention has one key for each query head
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    if "mrope_section" in getattr(cls, "ignore_keys_at_rope_validation", ()):
        settings["rope_parameters"] = dict(ROPE)
    settings |= copy.deepcopy(merge(OTHER.get(cls.__name__, {}), given))
    for name, spec in cls.sub_configs_defaults.items():
        inner = settings.get(name)
        if isinstance(inner, PreTrainedConfig) or (inner is None and (spec.optional or name in settings)):
            continue
        inner = dict(inner or {})
        kind = inner.pop("model_type", spec.model_type)
        own = issubclass(spec.config_class, PreTrainedConfig) and kind == spec.model_type
        inner_cls = spec.config_class if own else spec.get_config_class(kind)
        kept = {} if kind != spec.model_type else {k: v for k, v in spec.init_kwargs.items() if not sized(v)}
        settings[name] = small(inner_cls, **(kept | inner))
    return cls(**settings)


def sized(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Both, where nested settings are merged too."""
    found = below | above
    for name in below.keys() & above.keys():
        if isinstance(below[name], dict) and isinstance(above[name], dict):
            found[name] = merge(below[name], above[name])
    return found


def rule(field: dataclasses.Field) -> Any:
    if field.name in BASE:
        return None
    if isinstance(field.default, float) and re.search(r"drop|jitter", field.name):
        return 0.0
    if field.name in FLOATS and (isinstance(field.default, (int, float)) or field.default is None):
        return FLOATS[field.name]
    if field.default is None:
        return UNSET.get(field.name)
    if not sized(field.default):
        return None
    value = next((value for pattern, value in PATTERNS if pattern.fullmatch(field.name)), None)
    token = re.search(r"_(token_)?(id|index)$", field.name)
    return value if value is None or token else min(value, field.default)  # small does not mean larger

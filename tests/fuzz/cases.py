"""A seed to a case: which function, with which options."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace
from typing import Any

from .spaces import GROUPS, SHARES, SPACES


@dataclass(frozen=True)
class Case:
    """What is called with what: the options say, and the seed the numbers."""

    seed: int
    function: str
    options: dict[str, Any]

    def __str__(self) -> str:
        """On one line: what is not the simplest."""
        space = SPACES[self.function]
        used = self.relevant()
        told = {name: value for name, value in self.options.items() if name in used and value != space[name][0]}
        return f"seed {self.seed}: {self.function}({', '.join(f'{name}={value}' for name, value in told.items())})"

    def relevant(self) -> list[str]:
        if self.function != "chain":
            return list(self.options)
        unused = next(path for path in SPACES["chain"]["path"] if path != self.options["path"])
        return [name for name in self.options if not name.startswith(f"{unused}.")]

    def part(self, name: str) -> Case:
        """The case of one function of a chain."""
        start = f"{name}."
        options = {key.removeprefix(start): value for key, value in self.options.items() if key.startswith(start)}
        return Case(self.seed, name, options)

    def changed(self, **options: Any) -> Case:
        return settled(replace(self, options={**self.options, **options}))

    def to_json(self) -> str:
        return json.dumps({"seed": self.seed, "function": self.function, **self.options}, default=str)


def drawn(seed: int, function: str | None = None) -> Case:
    """The case of a seed; of one function where it is named."""
    rng = random.Random(seed)
    chosen = rng.choices(list(SHARES), list(SHARES.values()))[0]
    function = function or chosen
    return settled(Case(seed, function, {name: rng.choice(values) for name, values in SPACES[function].items()}))


def settled(case: Case) -> Case:
    """The nearest case that means something: what the documentation excludes is changed to what it allows."""
    o, function = dict(case.options), case.function
    if function == "chain":
        for name in ("sequence_logps", "linear_sequence_logps", "napo_loss"):
            part = settled(case.part(name)).options
            part |= {"call": "plain", "inplace": False} if name != "napo_loss" else {"call": "plain"}
            o |= {f"{name}.{key}": value for key, value in part.items() if f"{name}.{key}" in o}
        return replace(case, options=o)
    if "backend" in o:
        _settle_positions(o, function)
    if "q_from" in o:
        _settle_moments(o, function)
    if "recipe" in o:
        _settle_settings(o, function)
    if function == "noise_aware_dpo_loss" and o["K"] is None and o["q"] in ("[K, 1]", "[K, B]"):
        o["q"] = "[B]"
    return replace(case, options=o)


def _settle_positions(o: dict[str, Any], function: str) -> None:
    if o["dtype"] == "float64":
        o["backend"] = "eager"  # kernels compute in float32
    if o["backend"] == "triton" and o["V"] > 300 and o["N"] * o["T"] > 16:
        o["V"] = 257  # the interpreter is slow
    if o["call"] == "compile" and (o["outside"] or function in GROUPS):
        o["call"] = "plain"
    if function in GROUPS:
        o["shard"], o["outside"] = None, False
        o["call"] = "plain" if o["call"] != "again" else "again"
        if o["split"] == "dtensor":
            o |= {"packed": False, "logits_layout": "dense"} if "logits_layout" in o else {"packed": False}
    if o["shard"] == "padded" and o.get("values") == "label_minus_inf":
        o["values"] = "minus_inf"
    if o["outside"]:
        o |= {"values": "normal", "call": "plain", "mask": "none", "upstream": "normal", "weights": None}
        o["ignore_index"] = "-100"
        if "max_active" in o:
            o["max_active"] = None
    if "D" in o:
        if o["call"] == "autocast" and o["autocast"] == "float16" and o["upstream"] == "large":
            o["upstream"] = "normal"  # gradients overflow in it, those of a linear layer too
        if o["lora"] is None and o["trained"] in ("lora", "lora_A"):
            o["trained"] = "hidden"
        if not o["bias"] and o["trained"] == "bias":
            o["trained"] = "weight"
        if o["values"] == "offset":
            o |= {"bias": True, "softcap": None, "logit_scale": None, "lora": None}
    elif o["inplace"] and o["logits_layout"] == "expanded":
        o["inplace"] = False


def _settle_moments(o: dict[str, Any], function: str) -> None:
    if o["q_from"] == "each_pair":
        o["decay"] = 0.0 if "recipe" in o else o.get("decay", 0.0)
        if o.get("estimator") in ("moment", "mixed"):
            o["estimator"] = "released"
        if o.get("recipe") == "scale_free":
            o["recipe"] = "custom"
        if function in GROUPS:
            o["q_from"] = "all_pairs"
    if o.get("from_moments"):
        o["q_from"] = "rank_means"
    if o.get("estimator") == "moment" and function in ("noise_level", "moments_group"):
        o["alpha"] = None


def _settle_settings(o: dict[str, Any], function: str) -> None:
    """The objective's: names go with recipes that have them, lengths with means, kernels with what they know."""
    if o["recipe"] in ("released", "paper", "scale_free"):
        o["K"] = 3
    if o["recipe"] is None and o["K"] is None and o["named"]:
        o["K"] = 1
    if o["K"] is None:
        o["named"] = False
        o |= {
            name: "released" if name == "estimator" else None for name in ("estimator", "fixed_q") if o[name] == "mixed"
        }
        o["margin"] = "sum" if o["margin"] == "mixed" else o["margin"]
        o["weight"] = 0.25 if o["weight"] == "mixed" else o["weight"]
    means = o["average"] or o["recipe"] in ("released", "paper") or (o["recipe"] is None and o["named"])
    if (means or (o["recipe"] == "custom" and o["margin"] != "sum")) and o["lengths"] is None:
        o["lengths"] = "float"
    if o["dtype"] == "float64" or o["beta_is"] != "float" or o["q_from"] == "each_pair":
        o["fused"] = False
    if function == "NaPOLoss":
        o["previous"] = None
        if o["q_from"] == "each_pair":
            o["pieces"] = None
    if function in GROUPS:
        o |= {"call": "plain", "dtype": "float32" if o["dtype"] == "float64" else o["dtype"]}

"""A seed to a case: which function, with which options. Each option lists its values, the simplest first."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace
from typing import Any

LAYOUT = ["dense", "dense", "dense", "interleaved", "transposed", "sliced", "offset", "expanded"]
DTYPE = ["float32", "float32", "bfloat16", "float16", "float64"]

POSITIONS = {
    "backend": ["eager", "eager", "eager", "triton"],  # the interpreter takes a hundred times as long
    "dtype": DTYPE,
    "N": [1, 2, 3, 5],
    "T": [3, 1, 2, 8, 17],
    "shift": [True, True, False],
    "packed": [False, False, True],
    "cu_dtype": ["int64", "int32"],
    "labels_dtype": ["int64", "int32"],
    "mask": ["none", "some", "some", "some", "head", "one_all", "all"],
    "ignore_index": ["-100", "-100", "-100", "-1", "0", "last"],
    "outside": [*[False] * 30, True],
    "weights": [None, None, "uniform", "zeros", "signed"],
    "weights_dtype": ["float32", "same", "float64"],
    "weights_layout": LAYOUT,
    "labels_layout": LAYOUT,
    "shard": [None, None, None, "whole", "padded"],
    "upstream": ["normal", "normal", "zeros", "ones", "large"],
    "masked_nan": [False, True],
    "call": [*["plain"] * 60, *["no_grad"] * 4, *["autocast"] * 10, *["again"] * 8, "compile"],
    "autocast": ["bfloat16", "float16"],
}

LOGITS = {
    **POSITIONS,
    "V": [5, 1, 2, 3, 7, 8, 16, 31, 64, 129, 257, 300, 1031, 5003],
    "logits_layout": LAYOUT,
    "values": [
        "normal", "normal", "normal", "wide", "offset", "minus_offset", "minus_inf", "label_minus_inf", "nan", "inf",
        "all_minus_inf", "constant",
    ],
    "inplace": [False, False, False, True],
    "trained": [True, True, True, True, False],
}  # fmt: skip

HIDDEN = {
    **POSITIONS,
    "V": [5, 1, 2, 3, 7, 8, 16, 31, 64, 129, 257, 300, 1031],
    "D": [4, 1, 3, 8, 16, 33, 64],
    "values": ["normal", "normal", "normal", "wide", "offset", "nan", "whole", "constant"],
    "lora": [None, None, 1, 2, 5],
    "lora_scale": [1.0, 0.5, 2.0],
    "bias": [False, True],
    "softcap": [None, None, 5.0, 30.0, 0.5],
    "logit_scale": [None, None, 0.5, 0.0625, 3.0],
    "budget": [None, 1, 999, 4096, 2**28],
    "max_active": [None, None, None, "exact", "more", "less"],
    "statistics": [False, True],
    "trained": ["all", "all", "hidden", "weight", "bias", "lora", "lora_A", "frozen_head", "nothing"],
    "hidden_layout": LAYOUT,
    "weight_layout": LAYOUT,
    "bias_layout": LAYOUT,
    "lora_A_layout": LAYOUT,
    "lora_B_layout": LAYOUT,
}

LOGPS = {
    "dtype": DTYPE,
    "reference_dtype": ["same", "same", "float32", "bfloat16"],
    "B": [2, 1, 3, 4, 7, 9, 33],
    "K": [None, None, 1, 2, 3, 5],
    "values": [
        "normal", "normal", "normal", "large", "tiny", "same", "cancel", "excluded_chosen", "excluded_rejected",
        "excluded_both", "reference_excluded", "nan",
    ],
    "reference": ["given", "given", "given", None],
    "beta": [0.1, 0.1, 0.01, 1.0, 5.0],
    "beta_is": ["float", "float", "float", "tensor", "tensor64"],
    "policy_chosen_layout": LAYOUT,
    "policy_rejected_layout": LAYOUT,
    "reference_chosen_layout": LAYOUT,
    "reference_rejected_layout": LAYOUT,
    "upstream": ["normal", "zeros", "ones", "large"],
    "references_trained": [False, False, True],
    "call": [*["plain"] * 60, *["no_grad"] * 2, *["autocast"] * 6, *["again"] * 4, "compile"],
    "autocast": ["bfloat16", "float16"],
}  # fmt: skip

FIXED_Q = {
    **LOGPS,
    "q": [0.5, 0.0, 1.0, 0.001, 1e-12, 1e-31, "[]", "[B]", "[K, 1]", "[K, B]"],
    "q_values": ["uniform", "uniform", "edges", "outside"],
    "q_dtype": ["same", "float32", "float64", "bfloat16"],
    "q_layout": LAYOUT,
}

SETTINGS = {
    "recipe": ["custom", "custom", "custom", None, "released", "paper", "scale_free"],
    "estimator": ["released", "paper", "moment", "mixed"],
    "alpha": [0.01, 0.5, 5.0],
    "margin": ["sum", "sum", "mean", "mixed"],
    "fixed_q": [None, None, None, 0.0, 0.3, 1.0, "mixed"],
    "weight": [1.0, 0.25, 0.0, "mixed"],
    "weights": [None, "fixed", "dynamic", "dynamic"],
    "average": [False, False, True],
    "sft": [0.0, 0.0, 0.5],
    "q_from": ["rank_means", "rank_means", "all_pairs", "each_pair"],
    "decay": [0.0, 0.0, 0.5, 0.9],
    "previous": [None, "moments", "tensor", "infinite"],
    "previous_layout": LAYOUT,
    "named": [False, False, True],
    "lengths": [None, "float", "float", "int", "zero"],
    "chosen_length_layout": LAYOUT,
    "rejected_length_layout": LAYOUT,
    "fused": [*[False] * 7, True],
}

OBJECTIVE = {**LOGPS, **SETTINGS}

MARGINS = {
    name: values for name, values in LOGPS.items() if name in ("dtype", "B", "K", "call", "autocast")
} | {
    "values": ["normal", "large", "tiny", "same", "cancel", "excluded_chosen", "excluded_rejected", "nan", "ties"],
    "trained": [False, True],
    "margin_layout": LAYOUT,
}  # fmt: skip

MOMENTS = {
    **MARGINS, "q_from": SETTINGS["q_from"], "decay": SETTINGS["decay"], "previous": SETTINGS["previous"],
    "previous_layout": LAYOUT,
}  # fmt: skip

NOISE = {
    **MARGINS, "q_from": SETTINGS["q_from"], "estimator": ["released", "paper", "moment"],
    "alpha": [None, 0.01, 0.5, 20.0], "bounds": [None, None, (0.0, 1.0), (0.2, 0.9), (0.5, 0.5)],
    "from_moments": [False, False, True],
}  # fmt: skip


def inner(space: dict[str, list], name: str) -> dict[str, list]:
    return {f"{name}.{option}": values for option, values in space.items()}


SPACES: dict[str, dict[str, list]] = {
    "sequence_logps": LOGITS,
    "linear_sequence_logps": HIDDEN,
    "noise_aware_dpo_loss": FIXED_Q,
    "napo_loss": OBJECTIVE,
    "NaPOLoss": {
        **OBJECTIVE, "steps": [1, 2, 3], "reduction": ["none", "mean"], "evaluates": [False, False, True],
        "pieces": [None, None, 1, 2, 3],
    },
    "margin_moments": MOMENTS,
    "noise_level": NOISE,
    "likely_swapped": {**MARGINS, "count": ["one", "half", "all"]},
    "chain": {
        "path": ["sequence_logps", "linear_sequence_logps"], **inner(LOGITS, "sequence_logps"),
        **inner(HIDDEN, "linear_sequence_logps"), **inner(OBJECTIVE, "napo_loss"),
    },
    "all_reduce_logps": {
        "W": [1, 2, 3, 4], "dtype": ["float32", "float64"], "N": [1, 2, 5], "layout": LAYOUT,
        "values": ["normal", "minus_inf", "nan"], "rest": [False, True],
    },
    "vocabulary_logits": {"W": [2, 3, 4], "split": ["equal", "padded", "anywhere", "dtensor"], **LOGITS},
    "vocabulary_hidden": {"W": [2, 3, 4], "split": ["equal", "padded", "anywhere", "dtensor"], **HIDDEN},
    "napo_loss_group": {"W": [2, 3, 4], "empty": [False, True], "ragged": [False, True], **OBJECTIVE},
    "moments_group": {"W": [2, 3, 4], "empty": [False, True], "ragged": [False, True], **NOISE, **MOMENTS},
}  # fmt: skip

SHARES = {
    "sequence_logps": 22, "linear_sequence_logps": 24, "noise_aware_dpo_loss": 7, "napo_loss": 14, "NaPOLoss": 6,
    "margin_moments": 4, "noise_level": 5, "likely_swapped": 1, "chain": 8, "all_reduce_logps": 1,
    "vocabulary_logits": 2, "vocabulary_hidden": 3, "napo_loss_group": 2, "moments_group": 1,
}  # fmt: skip
"""Of a hundred cases."""

GROUPS = ("all_reduce_logps", "vocabulary_logits", "vocabulary_hidden", "napo_loss_group", "moments_group")
"""Those that need processes."""


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
    if "B" in o:
        _settle_autocast(o)
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
        if o["lora"] is None and o["trained"] in ("lora", "lora_A"):
            o["trained"] = "hidden"
        if not o["bias"] and o["trained"] == "bias":
            o["trained"] = "weight"
        if o["values"] == "offset":
            o |= {"bias": True, "softcap": None, "logit_scale": None, "lora": None}
    elif o["inplace"] and o["logits_layout"] == "expanded":
        o["inplace"] = False


def _settle_autocast(o: dict[str, Any]) -> None:
    """PyTorch stacks no bfloat16 tensors under an autocast to float16."""
    if o["autocast"] == "float16" and "bfloat16" in (o["dtype"], o.get("reference_dtype")):
        o["autocast"] = "bfloat16"


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
        o |= {name: "released" if name == "estimator" else None for name in ("estimator", "fixed_q") if o[name] == "mixed"}
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

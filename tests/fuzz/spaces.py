"""What can be drawn: the options of each function, each with its values, the simplest first; repeated: more often."""

from __future__ import annotations

LAYOUT = ["dense", "dense", "dense", "interleaved", "transposed", "sliced", "offset", "expanded"]
PAIR_MASK = [None, None, None, "some", "some", "all", "none"]
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
    "pair_mask": PAIR_MASK,
    "mask_of": ["rejected", "chosen", "both"],
    "masked_value": ["as drawn", "nan", "inf"],
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

MASKS = {"pair_mask": PAIR_MASK, "mask_of": ["rejected", "chosen"], "masked_value": LOGPS["masked_value"]}

MOMENTS = {
    **MARGINS, **MASKS, "q_from": SETTINGS["q_from"], "decay": SETTINGS["decay"], "previous": SETTINGS["previous"],
    "previous_layout": LAYOUT,
}  # fmt: skip

NOISE = {
    **MARGINS, **MASKS, "q_from": SETTINGS["q_from"], "estimator": ["released", "paper", "moment"],
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

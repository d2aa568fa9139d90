"""docs/migration.md: every name of ours in it exists, and of TRL and Liger those of the installed versions."""

import ast
import dataclasses
import inspect
import re
from functools import lru_cache
from pathlib import Path

import pytest
import torch

import napo_loss
from napo_loss import SequenceLogps

pytest.importorskip("trl")
from napo_loss import bias
from napo_loss.trl import NaPOConfig, NaPOTrainer, config, metrics

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/migration.md").read_text()
OURS, TRL, LIGER = "ours", "TRL", "Liger"


def tables() -> list[list[list[str]]]:
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", PAGE, re.MULTILINE):
        head, _, *rows = [
            [cell.strip() for cell in line.strip().strip("|").split(" | ")] for line in block.splitlines()
        ]
        found.append([head, *rows])
    return found


def column_of(head: str) -> str | None:
    for whose, words in ((OURS, ("here", "`NaPO")), (LIGER, ("Liger",)), (TRL, ("TRL",))):
        if head.startswith(words):
            return whose
    return None  # the released code, or what a row is about


def spans(whose: str) -> list[str]:
    """What stands in back quotes in all columns of one library."""
    return [
        span
        for head, *rows in tables()
        for i, title in enumerate(head)
        if column_of(title) == whose
        for row in rows
        for span in re.findall(r"`([^`]+)`", row[i])
    ]


def parameters(*things) -> set[str]:
    return {name for thing in things for name in inspect.signature(thing).parameters}


@lru_cache
def known_to_us() -> set[str]:
    public = [getattr(napo_loss, name) for name in napo_loss.__all__ if callable(getattr(napo_loss, name))]
    public += [getattr(bias, name) for name in bias.__all__ if callable(getattr(bias, name))]
    out = napo_loss.napo_loss(*[torch.zeros(2)] * 4)
    zero = SequenceLogps(torch.zeros(2), torch.ones(2))
    negative = SequenceLogps(torch.zeros(1, 2), torch.ones(1, 2))
    stacked = out._replace(rejected_rewards=out.rejected_rewards[None], q=out.q[None], weights=out.weights[None])
    logged = metrics.of_pairs(stacked, zero, negative, ["<name>"])
    columns = {"prompt", "chosen", "rejected", "image", "images", "ref_chosen_logps", "ref_rejected_logps"}
    return {*napo_loss.__all__, *bias.__all__, *parameters(*public), *logged, *columns, "NaPOConfig", "NaPOTrainer"}


def names_of_ours(span: str) -> set[str]:
    """``Recipe(weights="fixed")``: ``Recipe``, and whether it takes ``weights``; other spans: themselves."""
    called = re.fullmatch(r"(\w+)\((?:…, )?(.*)\)", span)
    if called:
        thing = getattr(napo_loss, called[1])
        given = set(re.findall(r"(\w+)=", called[2]))
        assert given <= parameters(thing), span
        if "…" not in span and not span.endswith("=)"):
            eval(span, vars(napo_loss))  # what is written is taken
        return {called[1]}
    if re.fullmatch(r"\w+\.\w+", span):
        owner, _, attribute = span.partition(".")
        assert hasattr(getattr(napo_loss, owner), attribute), span
        return {owner}
    name, _, value = span.partition("=")
    if value:
        if name == "shift":
            assert ast.literal_eval(value) is False
        elif name in ("q_over", "negatives"):
            NaPOConfig("out", use_cpu=True, bf16=False, **{name: ast.literal_eval(value)})
    return set() if span in ("None", '"sum"') else {name}


def test_every_name_of_ours_exists():
    fields = {field.name for field in dataclasses.fields(NaPOConfig)}
    for span in spans(OURS):
        unknown = names_of_ours(span) - known_to_us() - fields
        assert not unknown, f"{span} is not ours"
    assert len(spans(OURS)) > 60


def test_what_is_called_refused_is():
    said = next(row for head, *rows in tables() for row in rows if row[-1].startswith("refused unless"))
    named = set(re.findall(r"`(\w+)`", said[0])) | {"padding_free"}
    assert named <= config.REFUSED.keys()
    assert {n for n in config.REFUSED if n != "f_alpha_divergence_coef"} == named


@lru_cache
def source_of_trl() -> str:
    import trl.trainer.dpo_config
    import trl.trainer.dpo_trainer

    return inspect.getsource(trl.trainer.dpo_trainer) + inspect.getsource(trl.trainer.dpo_config)


def test_every_name_of_trl_exists():
    import trl
    import trl.kernels
    import trl.trainer.utils

    fields = {field.name for field in dataclasses.fields(trl.DPOConfig)}
    known = fields | parameters(trl.DPOTrainer) | {*vars(trl.trainer.utils), *vars(trl.kernels)}
    known |= {"DPOTrainer", "DPOConfig"} | set(re.findall(r'_metrics\[mode\]\["([^"]+)"\]', source_of_trl()))
    known |= set(re.findall(r"\"(prompt|chosen|rejected|images?|completion_mask)\"", source_of_trl()))
    for span in spans(TRL):
        if span == ".chunk(2)":
            assert ".chunk(2" in source_of_trl()
            continue
        name, _, value = span.partition("=")
        assert name in known, f"{span} is not TRL's"
        for loss_type in ast.literal_eval(value) if value else []:
            assert f'loss_type == "{loss_type}"' in source_of_trl(), span
    assert issubclass(NaPOConfig, trl.DPOConfig)
    assert issubclass(NaPOTrainer, trl.DPOTrainer)


def test_every_name_of_liger_exists():
    pytest.importorskip("liger_kernel")
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    known = parameters(LigerFusedLinearDPOLoss, LigerFusedLinearDPOLoss.forward)
    for span in spans(LIGER):
        name, _, value = span.partition("=")
        assert name in known, f"{span} is not Liger's"
        if value:
            LigerFusedLinearDPOLoss(**{name: ast.literal_eval(value)})
    assert len(spans(LIGER)) > 10


def test_the_page_names_the_versions():
    versions = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert f"TRL {versions['trl']} and liger-kernel {versions['liger-kernel']}" in PAGE

"""A training step of a small transformers model: NaPOTrainer, TRL's DPOTrainer, and that with others' parts.

All are TRL trainers on the same pairs, so data and optimiser cost the same; they differ in the head, the loss, what
they log and, where Liger's layer kernels can run, the layers. The model is built from a config: nothing is downloaded.
"""

# Peers are optional, and transformers types its trainer's model too loosely to follow:
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import contextlib
import io
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from benchmarks.measure import DEVICE, GPU, Peak, in_fresh_process, synchronize
from benchmarks.record import Row
from benchmarks.runner import Case, Timed

OURS, BARE, TRL, LAYERS, LIGER = PROVIDERS = (
    "napo_loss, NaPOTrainer",
    "napo_loss, fused_head subclass",
    "TRL DPOTrainer",
    "TRL DPOTrainer, Liger layers",
    "Liger fused-linear DPO step",
)


class Size(NamedTuple):
    name: str
    B: int  # pairs a step
    prompt: int  # tokens, the only ones masked
    answer: int
    D: int
    V: int
    layers: int
    warm_up: int
    steps: int


TURNS = 1 if GPU else 2
"""Trainings of each trainer, which alternate: on a shared machine the minute matters more than the provider."""

QUICK = Size("toy", 2, 8, 8, 32, 500, 1, 1, 3)
if GPU:
    SIZES = [Size("2-layer Llama", 4, 700, 300, 2048, 128256, 2, 5, 20)]
else:
    SIZES = [Size("2-layer Llama", 2, 90, 38, 256, 32000, 2, 2, 5)]


def cases(quick: bool) -> Iterator[Case]:
    for size in [QUICK] if quick else SIZES:
        T = size.prompt + size.answer
        yield Case(
            Row(
                "end_to_end", size.name, "", "step", N=2 * size.B, T=T, D=size.D, V=size.V, c=round(size.answer / T, 3),
                dtype="bfloat16" if GPU else "float32", active=2 * size.B * size.answer,
            ),
            PROVIDERS,
            partial(_time, size),
            partial(in_fresh_process, memory, size),
        )  # fmt: skip


def _time(size: Size, providers: Sequence[str]) -> Timed:
    timed: Timed = {}
    for turn in range(TURNS):
        for name in providers:
            before = timed.get(name, [])
            if isinstance(before, Exception):
                continue
            try:
                timed[name] = before + train(size, name, turn).ms
            except Exception as error:
                timed[name] = error.with_traceback(None)
    return timed


def memory(size: Size, name: str) -> int:
    """Peak of the later steps beyond what is held between steps (weights, the reference's, the optimiser's state)."""
    return train(size, name, 0).extra_bytes


class Seen(NamedTuple):
    ms: list[float]
    extra_bytes: int


@lru_cache
def train(size: Size, name: str, turn: int) -> Seen:  # `turn`: another turn trains again
    """Runs a trainer quietly; milliseconds from the end of a step to the end of the next, after the warm-up.

    Remembered: on a GPU, where memory needs no process of its own, one training gives both.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))  # progress bars of datasets
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        trainer = make_trainer(size, name, folder)
        watch = _watch(size)
        trainer.add_callback(watch)
        trainer.train()
        ends = watch.ends
        return Seen([1e3 * (b - a) for a, b in pairwise(ends)], watch.peak.bytes())


def _watch(size: Size) -> Any:
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def __init__(self):
            self.ends: list[float] = []

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == size.warm_up:
                self.peak = Peak()
            synchronize()
            if state.global_step >= size.warm_up:
                self.ends.append(time.perf_counter())

    return Watch()


def make_trainer(size: Size, name: str, folder: str) -> Any:
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    from napo_loss.trl import NaPOConfig, NaPOTrainer

    made: dict[str, Any] = {OURS: lambda: NaPOTrainer, BARE: _bare_trainer, LIGER: _liger_trainer}
    trainer = made.get(name, lambda: DPOTrainer)()
    config = NaPOConfig if name == OURS else DPOConfig
    layers = name == LAYERS
    if layers:
        import liger_kernel  # noqa: F401

        if not GPU:
            raise RuntimeError("Liger's layers are Triton kernels: they need a GPU")
    arguments = config(
        folder, per_device_train_batch_size=size.B, max_steps=size.warm_up + size.steps, learning_rate=1e-5,
        logging_steps=1000, save_strategy="no", report_to="none", bf16=GPU, gradient_checkpointing=False,
        disable_tqdm=True, dataloader_pin_memory=False, use_cpu=not GPU, use_liger_kernel=layers, max_length=None,
    )  # fmt: skip
    model, reference = (make_model(size) for _ in range(2))
    return trainer(model, reference, arguments, train_dataset=pairs(size), processing_class=tokenizer(size.V))


def make_model(size: Size) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size.V, hidden_size=size.D, intermediate_size=3 * size.D, num_hidden_layers=size.layers,
        num_attention_heads=size.D // 32, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        dtype="bfloat16" if GPU else "float32",
    )  # fmt: skip
    with torch.device(DEVICE):
        model: Any = LlamaForCausalLM(config)
    return model.to(torch.bfloat16 if GPU else torch.float32)


@lru_cache(1)
def tokenizer(V: int) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(3, V))])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def pairs(size: Size) -> Any:
    from datasets import Dataset

    g = torch.Generator().manual_seed(0)

    def words(count: int) -> str:
        return " ".join(f"w{i}" for i in torch.randint(3, size.V, (count,), generator=g).tolist())

    columns = {"prompt": [words(size.prompt) for _ in range(4 * size.B)]}
    for name in ("chosen", "rejected"):  # the end-of-sequence token is the answer's last
        columns[name] = [f" {words(size.answer - 1)} " for _ in range(4 * size.B)]
    return Dataset.from_dict(columns)


def _bare_trainer() -> Any:
    """The subclass of docs/trainers.md, for one GPU: our head and loss, one metric."""
    from trl.trainer.dpo_trainer import DPOTrainer

    from napo_loss import fused_head, napo_loss

    class BareTrainer(DPOTrainer):
        model: Any
        ref_model: Any

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            inputs = dict(inputs)
            labels = inputs["input_ids"].masked_fill(inputs.pop("completion_mask") == 0, -100)
            with torch.no_grad(), fused_head(self.ref_model):
                reference = self.ref_model(**inputs, labels=labels).pairs()
            with fused_head(model):
                policy = model(**inputs, labels=labels).pairs()
            out = napo_loss(*policy, *(x.sum for x in reference), beta=self.beta)
            margin = (out.chosen_rewards - out.rejected_rewards).mean()
            self._metrics["train" if self.model.training else "eval"]["rewards/margins"].append(margin.item())
            return out.losses.mean()

    return BareTrainer


def _liger_trainer() -> Any:
    """DPOTrainer with Liger's fused-linear DPO loss in place of TRL's head, as its documentation has it."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss
    from trl.trainer.dpo_trainer import DPOTrainer

    class LigerTrainer(DPOTrainer):
        ref_model: Any
        fused: Any = LigerFusedLinearDPOLoss(beta=0.1)

        def _compute_loss(self, model, inputs, return_outputs):
            labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
            given = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "use_cache": False}
            hidden = model.model(**given).last_hidden_state
            with torch.no_grad():
                frozen = self.ref_model.model(**given).last_hidden_state
            heads = model.lm_head.weight, self.ref_model.lm_head.weight
            loss, _ = self.fused(
                heads[0], hidden[:, :-1], labels[:, 1:], ref_input=frozen[:, :-1], ref_weight=heads[1]
            )  # fmt: skip
            return loss

    return LigerTrainer

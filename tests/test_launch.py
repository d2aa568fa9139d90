"""NaPOTrainer under `accelerate launch`: on 2 and 4 gloo processes the numbers of one process, to float32 rounding.

Gradients are compared as they are, before the optimiser's step: Adam would make a sign of them.
"""

import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from sysconfig import get_path

import pytest
import torch
from transformers import LlamaForCausalLM

import launched
import processes
import tiny
from napo_loss import fused_head
from napo_loss.trl import STATE_FILE
from trainers import NAMES

pytestmark = [
    pytest.mark.slow,  # in `make test`, tests of ranks and of the trainer stand for it
    # transformers 5.23 warns about names that TRL 1.16 still uses.
    pytest.mark.filterwarnings("ignore:.*(is_)?gradient_checkpointing.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*use_cpu.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
FSDP2 = [
    "--use_fsdp", "--fsdp_version=2", "--fsdp_auto_wrap_policy=TRANSFORMER_BASED_WRAP",
    "--fsdp_transformer_layer_cls_to_wrap=LlamaDecoderLayer",  # LLaVA's own list has classes that this one lacks
    "--fsdp_state_dict_type=SHARDED_STATE_DICT", "--fsdp_cpu_ram_efficient_loading=false",
    "--fsdp_sync_module_states=false",
]  # fmt: skip


def launch(folder, ranks, flags, *hows):
    """`accelerate launch` as a user types it; with `--cpu` it would start one process, which leaves the rest to MPI."""
    common = [f"--num_processes={ranks}", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *common, "--main_process_port=0", *flags]
    return processes.run(
        [*command, launched.__file__, folder, *hows],
        CUDA_VISIBLE_DEVICES="",
        HF_HOME=str(folder / "home"),  # where accelerate would find the settings of whoever runs this
        # DeepSpeed compiles an extension at its first use, with the ninja of this environment.
        DS_ACCELERATOR="cpu",
        PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    )


@pytest.fixture
def folder(tmp_path):
    return launched.save_pairs(tmp_path)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The same in one process."""
    return launched.everything(launched.save_pairs(tmp_path_factory.mktemp("one")) / "one")


def close(actual, expected, message):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6, msg=lambda m: f"{message}: {m}")


def assert_same(actual, expected, *, gradients=True):
    """Loss, every q and weight, the other metrics and the gradients of every step, and the weights after the last."""
    assert len(actual["steps"]) == len(expected["steps"]) > 0
    for step, (a, b) in enumerate(zip(actual["steps"], expected["steps"], strict=True)):
        assert a.keys() == b.keys()
        for name in b:
            close(torch.tensor(a[name]), torch.tensor(b[name]), f"{name} of step {step}")
    if gradients:
        assert len(actual["gradients"]) == len(expected["gradients"]) > 0
        for step, (a, b) in enumerate(zip(actual["gradients"], expected["gradients"], strict=True)):
            assert a.keys() == b.keys()
            for name in b:
                close(a[name], b[name], f"gradient of {name}, step {step}")
    assert actual["weights"].keys() == expected["weights"].keys()
    for name, weight in expected["weights"].items():
        close(actual["weights"][name], weight, name)


def assert_the_rest_is_the_same(results, expected, folder, *, gradients=True):
    """Ragged data, and what surrounds training: precomputed reference, evaluation, checkpoints."""
    assert_same(results["ragged"], expected["ragged"], gradients=gradients)
    # Left uneven, the loss is a mean of rank means, as everywhere in transformers; "mean" counts pairs for q.
    assert len(results["uneven"]["steps"]) == 2
    for a, b in zip(results["uneven"]["steps"], expected["uneven"]["steps"], strict=True):
        for name in NAMES:
            assert a[f"napo/q/{name}"] == pytest.approx(b[f"napo/q/{name}"], rel=1e-5)
    kept, resumed = results["kept"], results["resumed"]
    assert kept["reference"] is None
    assert_same(kept, expected["kept"], gradients=gradients)
    assert kept["evaluated"] == pytest.approx(expected["kept"]["evaluated"], rel=1e-5)
    assert (folder / "kept/checkpoint-1" / STATE_FILE).exists()
    assert len(resumed["steps"]) == 1
    assert_same(resumed, expected["resumed"], gradients=gradients)
    for name, weight in kept["weights"].items():
        assert torch.equal(resumed["weights"][name], weight), name
    close(resumed["moments"], kept["moments"], "moments")
    assert_same(results["in memory"], expected["in memory"], gradients=gradients)
    assert_same(results["uneven batch"], expected["uneven batch"], gradients=gradients)  # every pair counts once
    if "adapter" in results:
        assert_same(results["adapter"], expected["adapter"], gradients=gradients)
    images = results["images"]
    close(images["columns"], expected["images"]["columns"], "log-probs of images")
    assert_same(images, expected["images"], gradients=gradients)
    assert images["reference"] is None
    assert images["passes"] == 0


WRAPPED = {  # how the classes of the policy and of the reference begin
    "ddp": ("DistributedDataParallel", "L"),
    "fsdp2": ("FSDP", "FSDP"),
    "zero2": ("DeepSpeedEngine", "DeepSpeedEngine"),
    "zero3": ("DeepSpeedEngine", "DeepSpeedEngine"),
}


def assert_variants_are_the_same(how, results, expected, *, gradients=True):
    for name in launched.VARIANTS:
        for found, beginning in zip(results[name]["wrapped"], WRAPPED[how], strict=True):
            assert found.startswith(beginning)
        assert_same(results[name], expected[name], gradients=gradients)
        assert results[name]["evaluated"] == pytest.approx(expected[name]["evaluated"], rel=1e-5)


@pytest.mark.parametrize(
    ("ranks", "flags", "hows"),
    [
        pytest.param(2, ["--multi_gpu"], ["ddp"], id="2-ddp"),
        pytest.param(2, FSDP2, ["fsdp2"], id="2-fsdp2"),
        pytest.param(4, FSDP2, ["ddp", "fsdp2"], id="4-both"),
    ],
)
def test_ranks_train_as_one_process(ranks, flags, hows, folder, expected):
    done = launch(folder, ranks, flags, *hows)
    assert done.returncode == 0, done.stderr[-5000:]
    for how in hows:
        results = torch.load(folder / f"{how}.pt", weights_only=True)
        assert_variants_are_the_same(how, results, expected)
        if ranks == 2:
            assert_the_rest_is_the_same(results, expected, folder / how)
    if hows == ["ddp"]:
        saved = LlamaForCausalLM.from_pretrained(folder / "ddp/saved").state_dict()
        assert all(torch.equal(saved[name], weight) for name, weight in results["kept"]["weights"].items())


@pytest.mark.skipif(
    not (find_spec("deepspeed") and shutil.which("g++") and Path(get_path("include"), "Python.h").exists()),
    reason="needs DeepSpeed, and g++ with Python's headers for what it compiles",
)
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_trains_as_one_process(stage, folder, expected):
    done = launch(folder, 2, ["--use_deepspeed", f"--zero_stage={stage}"], f"zero{stage}")
    assert done.returncode == 0, done.stderr[-5000:]
    results = torch.load(folder / f"zero{stage}.pt", weights_only=True)
    # No gradients: its engine steps inside backward.
    assert_variants_are_the_same(f"zero{stage}", results, expected, gradients=False)
    assert_the_rest_is_the_same(results, expected, folder / f"zero{stage}", gradients=False)
    if stage == 3:
        model, ids = tiny.llama(), launched.head_batch()
        with fused_head(model):
            logps = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
        logps.sum.mean().backward()
        close(results["head"]["logps"], logps.sum.detach(), "log-probs")
        for name, p in model.named_parameters():
            close(results["head"]["gradients"][name], p.grad, name)


def test_a_rank_that_fails_ends_the_job(folder):
    done = launch(folder, 2, ["--multi_gpu"], "fails")
    assert done.returncode != 0
    assert "RuntimeError: this batch is broken" in done.stderr

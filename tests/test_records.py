"""Records cross borders: tree maps, pickles, copies, and the walks of accelerate, FSDP2, DDP and Lightning."""

import copy
import dataclasses
import pickle

import numpy as np
import pytest
import torch
from accelerate.utils import convert_outputs_to_fp32, send_to_device
from lightning_utilities.core.apply_func import apply_to_collection
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_flatten_with_path, tree_leaves, tree_map, tree_map_only

from napo_loss import (
    RELEASED,
    LowRank,
    NaPOLoss,
    NaPOOutput,
    Negative,
    PreferenceLoss,
    Recipe,
    SequenceLogps,
    TokenStatistics,
    VocabShard,
    napo_loss,
    noise_aware_dpo_loss,
)


def output(K=None) -> NaPOOutput:
    rows = (4,) if K is None else (K, 4)
    return napo_loss(-torch.rand(4), -torch.rand(rows), -torch.rand(4), -torch.rand(rows))


OF_TENSORS = [
    output(),
    output(3),
    SequenceLogps(torch.rand(3), torch.ones(3), TokenStatistics(*torch.rand(3, 2, 4)), torch.rand(())),
    noise_aware_dpo_loss(*(-torch.rand(4) for _ in range(4)), q=0.5),
    LowRank(torch.rand(5, 4), torch.rand(2, 4), torch.rand(5, 2), 0.5),
    VocabShard(torch.rand(1, 2, 4), None, V=4, start=0),
]
SETTINGS = [
    Negative(q=0.5),
    Recipe(),
    Recipe(Negative(alpha=0.5, margin="mean"), decay=0.5),
    Recipe({"a": Negative(), "b": {"q": 0.0}}, weights="dynamic"),
    RELEASED,
    Recipe(dict(RELEASED.negatives), decay=0.5),
]
WALKS = {
    "tree_map": lambda record, f: tree_map(f, record),
    "apply_to_collection": lambda record, f: apply_to_collection(record, torch.Tensor, f),
}


def fields(record) -> dict:
    """Every field, those beyond the triple too."""
    names = record._fields if isinstance(record, tuple) else [f.name for f in dataclasses.fields(record)]
    return {name: getattr(record, name) for name in names}


def assert_same(actual, expected, *, dtype=None):
    """The same record, with all its fields; tensors in another dtype where one is given."""
    assert type(actual) is type(expected)
    for name, x in fields(expected).items():
        if isinstance(x, torch.Tensor):
            torch.testing.assert_close(getattr(actual, name), x if dtype is None else x.to(dtype), msg=name)
        elif isinstance(x, TokenStatistics):
            assert_same(getattr(actual, name), x, dtype=dtype)
        else:
            assert getattr(actual, name) == x, name


@pytest.mark.parametrize("walk", WALKS)
@pytest.mark.parametrize("record", OF_TENSORS, ids=lambda x: type(x).__name__)
def test_a_walk_changes_tensors_and_nothing_else(record, walk):
    assert_same(WALKS[walk](record, lambda x: x.double()), record, dtype=torch.float64)


def test_what_sequence_logps_lack_stays_none():
    """A NamedTuple is a tree with None among its leaves: what walks over tensors meets it and leaves it."""
    plain = SequenceLogps(torch.rand(3), torch.ones(3))
    assert str(plain) == f"SequenceLogps(sum={plain.sum}, length={plain.length})"
    for walked in (
        tree_map_only(torch.Tensor, torch.clone, plain), WALKS["apply_to_collection"](plain, torch.clone),
        send_to_device(plain, "cpu"), convert_outputs_to_fp32(lambda: plain)(), copy.deepcopy(plain),
    ):  # fmt: skip
        assert_same(walked, plain)
        assert walked.tokens is walked.aux_loss is None


@pytest.mark.parametrize("record", OF_TENSORS, ids=lambda x: type(x).__name__)
def test_accelerate_leaves_records_whole(record):
    assert_same(send_to_device(record, "cpu"), record)
    assert fields(send_to_device(record, "meta"))  # really sent
    assert all(x.is_meta for x in tree_leaves(send_to_device(record, "meta")) if isinstance(x, torch.Tensor))
    assert_same(convert_outputs_to_fp32(lambda: record)(), record)
    half = SequenceLogps(torch.rand(3).half(), torch.ones(3))
    assert convert_outputs_to_fp32(lambda: half)().sum.dtype == torch.float32


@pytest.mark.parametrize("record", [*OF_TENSORS, *SETTINGS], ids=lambda x: type(x).__name__)
def test_pickle_and_deepcopy(record):
    for twin in (pickle.loads(pickle.dumps(record)), copy.deepcopy(record), copy.copy(record)):
        assert twin is not record or isinstance(record, Recipe | Negative)
        if isinstance(record, Recipe | Negative):
            assert twin == record
            assert hash(twin) == hash(record)
        else:
            assert_same(twin, record)


@pytest.mark.parametrize("record", SETTINGS, ids=lambda x: type(x).__name__)
def test_settings_are_leaves(record):
    assert tree_map(lambda x: x, record) == record
    assert send_to_device({"recipe": record}, "cpu") == {"recipe": record}


def test_the_result_unpacks_as_three_and_replaces_with_all_five():
    out = output(2)
    losses, chosen_rewards, rejected_rewards = out
    assert losses is out.losses is out[0]
    assert chosen_rewards is out.chosen_rewards is out[-2]
    assert rejected_rewards is out.rejected_rewards
    assert out[:2] == (losses, chosen_rewards)
    assert len(out) == len(list(out)) == len(PreferenceLoss._fields) == 3
    changed = out._replace(losses=losses * 2)
    torch.testing.assert_close(changed.losses, 2 * losses)
    assert changed.q is out.q
    assert changed.weights is out.weights
    with pytest.raises(TypeError):
        out._replace(loss=losses)
    assert [str(path[0]) for path, _ in tree_flatten_with_path(out)[0]] == [f".{name}" for name in fields(out)]


def test_to_moves_every_tensor():
    out = output(2).to(torch.float64)
    assert {x.dtype for x in fields(out).values()} == {torch.float64}
    assert out.to("meta").weights.is_meta
    head = LowRank(torch.rand(5, 4), torch.rand(2, 4), torch.rand(5, 2), 0.5).to(torch.bfloat16)
    assert head.lora_B.dtype == torch.bfloat16
    assert head.scale == 0.5


def test_a_compiled_step_returns_the_record():
    def step(*logps):
        return napo_loss(*logps)

    logps = [-torch.rand(4) for _ in range(4)]
    torch._dynamo.reset()
    assert_same(torch.compile(step, backend="eager", fullgraph=True)(*logps), step(*logps))


class Preference(nn.Module):
    """A model that computes the loss in its own forward, so that a wrapper meets the record on its way out."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.policy, self.loss = nn.Linear(6, 1), NaPOLoss(beta=1.0)

    def forward(self, chosen, rejected):
        logps = [self.policy(x).squeeze(-1) for x in (chosen, rejected)]
        return self.loss(*logps, None, None)


def wrapped_step(group, how):
    """The record and the gradient of a wrapped model, and of the same model alone."""
    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(4, 6, generator=g) for _ in range(2)]
    alone, model = Preference(), Preference()
    policy = model.policy
    if how == "ddp":
        model = DistributedDataParallel(model, process_group=group)
    else:
        mesh = torch.distributed.device_mesh.DeviceMesh.from_group(group, "cpu")
        fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(output_dtype=torch.float64))
    found = []
    for m, p in ((alone, alone.policy), (model, policy)):
        out = m(*inputs)
        out.losses.mean().backward()
        grad = p.weight.grad
        found.append((out, grad.full_tensor() if isinstance(grad, DTensor) else grad))
    (expected, expected_grad), (out, grad) = found
    assert_same(out, expected, dtype=torch.float64 if how == "fsdp2" else None)
    torch.testing.assert_close(grad, expected_grad)


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_wrappers_hand_the_record_out_and_its_gradient_back(ranks, how):
    ranks.run(2, wrapped_step, how)


# Settings


def test_a_recipe_keeps_what_it_was_given():
    given = {"a": Negative(), "b": {"q": 0.0}}
    recipe = Recipe(given)
    given["a"], given["c"] = Negative(q=1.0), Negative()
    given["b"]["q"] = 0.7
    assert dict(recipe.negatives) == {"a": Negative(), "b": Negative(q=0.0)}
    with pytest.raises(TypeError, match="does not support item assignment"):
        recipe.negatives["a"] = Negative()
    assert dataclasses.replace(recipe, decay=0.5).negatives == recipe.negatives
    assert repr(recipe.negatives) == repr(dict(recipe.negatives))
    assert dataclasses.asdict(recipe)["negatives"] == recipe.negatives


def test_a_dict_stands_for_a_negative():
    one = Recipe({"alpha": 0.5, "margin": "mean"})
    assert one.negatives == Negative(alpha=0.5, margin="mean")
    named = Recipe({"rejected": {"q": 0.0, "weight": 0.25}, "image_only": Negative()})
    assert named == Recipe({"rejected": Negative(q=0.0, weight=0.25), "image_only": Negative()})
    logps = [-torch.rand(4) for _ in range(4)]
    torch.testing.assert_close(
        napo_loss(*logps, recipe=Recipe({"q": 0.0})).losses, noise_aware_dpo_loss(*logps, q=0.0).losses
    )


@pytest.mark.parametrize(
    ("negatives", "error", "message"),
    [
        ({"a": {"gamma": 1}}, ValueError, r"negatives\['a'\] = .*'gamma', a Negative has alpha, .*, estimator"),
        ({"gamma": 1}, ValueError, r"Recipe.negatives = .*unexpected keyword argument 'gamma'"),
        ({"a": {"q": 2.0}}, ValueError, r"negatives\['a'\] = \{'q': 2.0\}: Negative.q must be None or in \[0, 1\]"),
        ({"a": {"alpha": "0.5"}}, TypeError, r"negatives\['a'\] = .*: Negative.alpha must be a number, got '0.5'"),
        ({"a": Negative(), "b": 0.5}, TypeError, r"negatives\['b'\] must be a Negative or a dict .*, got 0.5"),
        ({}, ValueError, "Recipe.negatives is an empty mapping"),
        ([Negative()], TypeError, "Recipe.negatives must be a Negative, a mapping"),
    ],
)  # fmt: skip
def test_negatives_are_checked_at_once(negatives, error, message):
    with pytest.raises(error, match=message):
        Recipe(negatives)


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({"q": 0.0}, "has no q of its own: give recipe=Recipe(Negative(q=0.0)) instead"),
        ({"alpha": 0.5, "margin": "mean"}, "Recipe(Negative(alpha=0.5, margin='mean'))"),
        ({"sft_weight": 0.1}, "has no sft_weight of its own: give recipe=Recipe(sft_weight=0.1)"),
        ({"q": 1, "weights": "dynamic"}, "Recipe(Negative(q=1), weights='dynamic')"),
        ({"label_smoothing": 0.1}, "got an unexpected keyword argument 'label_smoothing'"),
    ],
)
def test_settings_in_the_wrong_place_are_sent_to_the_recipe(settings, advice):
    logps = [torch.zeros(2)] * 4
    with pytest.raises(TypeError) as error:
        napo_loss(*logps, **settings)
    assert advice in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(TypeError) as error:
        NaPOLoss(**settings)
    assert advice in str(error.value)


@pytest.mark.parametrize("beta", [np.float32(0.5), np.float64(0.5), torch.tensor(0.5), torch.tensor(0.5).double()])
def test_beta_may_be_a_number_of_numpy_or_a_tensor(beta):
    logps = [-torch.rand(4) for _ in range(4)]
    for function in (napo_loss, lambda *x, beta: noise_aware_dpo_loss(*x, beta=beta, q=0.5)):
        given, plain = function(*logps, beta=beta), function(*logps, beta=0.5)
        for a, b in zip(given, plain, strict=True):
            assert a.dtype == torch.float32
            torch.testing.assert_close(a, b)


def test_beta_of_the_wrong_kind_or_value():
    logps = [torch.zeros(2)] * 4
    for wrong in (torch.tensor(0.0), torch.tensor(-1.0), torch.tensor(torch.nan), np.float32(0), "0.1", None, 1j):
        with pytest.raises(ValueError, match="beta must be a finite number > 0"):
            napo_loss(*logps, beta=wrong)
    with pytest.raises(ValueError, match=r"beta must be a number or a 0-d tensor, got shape \[1\]"):
        NaPOLoss(beta=torch.tensor([0.1]))


def test_a_beta_that_nobody_can_look_at_is_a_visible_nan():
    """While compiling, as on a GPU, a value is not read: a wrong one shows in every loss."""
    step = torch.compile(
        lambda x, beta: noise_aware_dpo_loss(x, x, None, None, beta=beta, q=0.5).losses, backend="eager"
    )
    assert step(torch.zeros(2), torch.tensor(0.1)).isfinite().all()
    assert step(torch.zeros(2), torch.tensor(-0.1)).isnan().all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8])
def test_counts_are_lengths(dtype):
    sums, counts = -torch.rand(3) * 9, torch.tensor([3, 4, 0])
    whole, exact = SequenceLogps(sums, counts.to(dtype)), SequenceLogps(sums, counts.float())
    torch.testing.assert_close(whole.mean, exact.mean)
    recipe = Recipe(Negative(alpha=0.5, margin="mean"), average_logps=True)
    out, expected = (napo_loss(x, x._replace(sum=sums - 1), sums, sums, recipe=recipe) for x in (whole, exact))
    assert_same(out, expected)
    named = napo_loss(whole, {"a": whole, "b": whole}, sums, {"a": sums, "b": sums}, recipe=recipe)
    assert named.losses.isfinite().all()


def test_lengths_of_the_wrong_kind_are_named():
    row = torch.zeros(2)
    recipe = Recipe(average_logps=True)
    for wrong, error in (
        (torch.ones(2, dtype=torch.bool), TypeError),
        ([1, 2], TypeError),
        (torch.ones(3), ValueError),
    ):
        bad, good = SequenceLogps(row, wrong), SequenceLogps(row, torch.ones(2))
        with pytest.raises(error, match="the length of policy_chosen_logps must"):
            napo_loss(bad, good, row, row, recipe=recipe)
        with pytest.raises(error, match=r"the length of policy_rejected_logps\['b'\] must"):
            napo_loss(good, {"a": good, "b": bad}, row, {"a": row, "b": row}, recipe=recipe)
    with pytest.raises(TypeError, match=r"policy_rejected_logps\['a'\] must be a torch.Tensor, got list"):
        napo_loss(row, {"a": [0.0, 0.0]}, row, {"a": row})


# The module


def test_the_module_is_the_function():
    logps = [-20 * torch.rand(5) for _ in range(4)]
    for recipe in (None, Recipe(Negative(q=0.3)), Recipe(sft_weight=0.1)):
        each = NaPOLoss(0.2, recipe)(*logps)
        assert_same(each, napo_loss(*logps, beta=0.2, recipe=recipe))
        mean, chosen_rewards, _ = NaPOLoss(0.2, recipe, reduction="mean")(*logps)
        torch.testing.assert_close(mean, each.losses.mean())
        assert mean.dim() == 0
        torch.testing.assert_close(chosen_rewards, each.chosen_rewards)
    assert repr(NaPOLoss(0.2)).startswith("NaPOLoss(beta=0.2, recipe=Recipe(")


def test_the_module_keeps_the_previous_moments():
    recipe = Recipe({"a": Negative(), "b": Negative(q=0.25)}, decay=0.5)
    module, kept = NaPOLoss(recipe=recipe), None
    assert module.state_dict() == {}
    for step in range(3):
        logps = [-300 * torch.rand(4), -300 * torch.rand(2, 4), -300 * torch.rand(4), -300 * torch.rand(2, 4)]
        expected = napo_loss(*logps, recipe=recipe, previous_moments=kept)
        assert_same(module(*logps), expected)
        kept = expected.moments
        torch.testing.assert_close(module.previous_moments, kept)
        if step == 1:  # evaluation neither reads nor moves it
            assert_same(module.eval()(*logps), napo_loss(*logps, recipe=recipe))
            torch.testing.assert_close(module.train().previous_moments, kept)
    resumed = NaPOLoss(recipe=recipe)
    resumed.load_state_dict(module.state_dict())
    assert_same(resumed(*logps), module(*logps))
    inside = nn.ModuleDict({"loss": NaPOLoss(recipe=recipe)})
    inside.load_state_dict({"loss.previous_moments": kept})
    torch.testing.assert_close(inside["loss"].previous_moments, kept)
    fresh = NaPOLoss(recipe=recipe)
    module.load_state_dict(fresh.state_dict())  # of a run that has not begun
    assert module.previous_moments is None
    twins = copy.deepcopy(resumed), pickle.loads(pickle.dumps(resumed))
    expected = resumed(*logps)
    for twin in twins:
        assert_same(twin(*logps), expected)
    assert resumed.to(torch.float64).previous_moments.dtype == torch.float64


def test_the_module_keeps_nothing_where_nothing_is_smoothed():
    logps = [-20 * torch.rand(4) for _ in range(4)]
    for recipe in (Recipe(), Recipe(q_from="each_pair")):
        module = NaPOLoss(recipe=recipe)
        module(*logps)
        assert module.state_dict() == {}


def shard_of_a_group(group):
    shard = VocabShard(torch.zeros(1, 2, 4), group, V=8)
    twin = copy.deepcopy(shard)
    assert twin.process_group is group
    assert twin.local is not shard.local
    assert_same(twin, shard)
    assert tree_map(lambda x: x.double(), shard).process_group is group


def test_a_shard_is_copied_without_its_group(ranks):
    ranks.run(2, shard_of_a_group)


def group_is_shared(group):
    module = NaPOLoss(process_group=group)
    assert copy.deepcopy(module).process_group is group
    with pytest.raises(TypeError, match="cannot be pickled: save its state_dict"):
        pickle.dumps(module)
    B = 0 if group.rank() == 0 else 3  # a rank without pairs: its mean is 0, and has a graph
    chosen = torch.zeros(B, requires_grad=True)
    loss, *_ = NaPOLoss(process_group=group, reduction="mean")(chosen, torch.zeros(B), None, None)
    loss.backward()
    assert loss.item() == (0.0 if B == 0 else 0.5)
    assert chosen.grad.shape == (B,)


def test_the_module_and_its_process_group(ranks):
    ranks.run(2, group_is_shared)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"beta": 0.0}, ValueError, "beta must be a finite number > 0, got 0.0"),
        ({"recipe": {"q": 0.0}}, TypeError, "recipe must be a Recipe or None"),
        ({"reduction": "sum"}, ValueError, "reduction must be 'none' or 'mean', got 'sum'"),
        ({"process_group": 3}, TypeError, "process_group must be a torch.distributed.ProcessGroup or None, got int"),
    ],
)
def test_the_module_is_checked_when_it_is_made(arguments, error, message):
    with pytest.raises(error, match=message):
        NaPOLoss(**arguments)

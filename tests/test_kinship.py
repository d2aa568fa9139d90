"""The table of docs/method.md that sets NaPO beside its kin: each gradient is DPO's times the factor it gives."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from napo_loss import Negative, Recipe, napo_loss, noise_aware_dpo_loss

BETA = 0.3
PAGE = (Path(__file__).parent.parent / "docs/method.md").read_text()


def margins(seed, B=7):
    """From a pair that the policy contradicts to one that it has learned."""
    g = torch.Generator().manual_seed(seed)
    return (20 * torch.randn(B, dtype=torch.float64, generator=g)).requires_grad_()


def ours(psi, q):
    zero = torch.zeros_like(psi)
    return noise_aware_dpo_loss(psi, zero, zero, zero, beta=BETA, q=q).losses


def log_p(psi):
    return F.logsigmoid(BETA * psi)


# A row of the table each: the loss of the batch, and the factor of each pair in its gradient.
def dpo(psi, _):
    return -log_p(psi).mean(), torch.ones_like(psi)


def napo(psi, q):
    return ours(psi, q).mean(), log_p(psi).exp() ** q


def sympo(psi, _):
    return torch.sigmoid(-BETA * psi).mean(), log_p(psi).exp()


def dr_dpo(psi, b):
    power = log_p(psi).exp() ** (1 / b)
    return -b * power.mean().log(), power / power.mean()


def ropo(psi, a):
    p = log_p(psi).exp()
    scale = 4 * a / (1 + a) ** 2
    return (scale * (-log_p(psi) + a * (1 - p))).mean(), scale * (1 + a * p)


def holder(psi, g):
    p = log_p(psi).exp()
    return (-(1 + g) * p**g + g * p ** (1 + g)).mean(), g * (1 + g) * p**g * (1 - p)


def cdpo(psi, e):
    loss = -(1 - e) * log_p(psi) - e * log_p(-psi)
    return loss.mean(), 1 - e / torch.sigmoid(-BETA * psi)


def rdpo(psi, e):
    loss = (-(1 - e) * log_p(psi) + e * log_p(-psi)) / (1 - 2 * e)
    odds = (BETA * psi).exp()
    return loss.mean(), (1 - e + e * odds) / (1 - 2 * e)


def ipo(psi, _):
    factor = (1 - 2 * BETA * psi) / (BETA**2 * torch.sigmoid(-BETA * psi))
    return ((psi - 1 / (2 * BETA)) ** 2).mean(), factor


ROWS = {
    "DPO": dpo, "NaPO": napo, "SymPO": sympo, "Dr. DPO": dr_dpo, "ROPO": ropo, "Hölder-DPO": holder, "cDPO": cdpo,
    "rDPO": rdpo, "IPO": ipo,
}  # fmt: skip


def test_every_row_of_the_table_is_here():
    table = PAGE.partition("## Its kin")[2].partition("| loss |")[2].split("\n\n")[0]
    rows = [line.split("|")[1].strip() for line in table.splitlines()[2:]]
    assert [row.partition(" (")[0].partition(",")[0] for row in rows] == list(ROWS)


@pytest.mark.parametrize("name", ROWS)
@given(seed=st.integers(0, 2**31), setting=st.floats(0.05, 0.45))
def test_the_gradient_is_that_of_dpo_times_the_factor(name, seed, setting):
    psi = margins(seed)
    loss, factor = ROWS[name](psi, setting)
    (gradient,) = torch.autograd.grad(loss, psi)
    of_dpo = -BETA * torch.sigmoid(-BETA * psi) / len(psi)
    torch.testing.assert_close(gradient, of_dpo * factor.detach(), rtol=1e-8, atol=1e-12)


@given(st.integers(0, 2**31), st.floats(0.1, 20))
def test_what_each_is_in_our_terms(seed, a):
    psi = margins(seed)
    torch.testing.assert_close(ours(psi, 0.0).mean(), dpo(psi, None)[0])
    torch.testing.assert_close(ours(psi, 1.0).mean(), sympo(psi, None)[0])
    # Dr. DPO: the factor of q = 1/β', over its mean.
    factor = napo(psi, 1 / (1 + a))[1]
    torch.testing.assert_close(factor / factor.mean(), dr_dpo(psi, 1 + a)[1])
    # Hölder-DPO: the factor of q = g, times 1 - p once more, up to a constant.
    p, g = log_p(psi).exp(), 1 / (1 + a)
    torch.testing.assert_close(g * (1 + g) * napo(psi, g)[1] * (1 - p), holder(psi, g)[1])
    # ROPO: the same pair twice, with q = 0 and q = 1.
    scale = 4 * a / (1 + a) ** 2
    recipe = Recipe({"first": Negative(q=0.0, weight=scale), "again": Negative(q=1.0, weight=a * scale)})
    pair = dict.fromkeys(recipe.named, -psi)
    losses = napo_loss(torch.zeros_like(psi), pair, None, None, beta=BETA, recipe=recipe).losses
    torch.testing.assert_close(losses.mean(), ropo(psi, a)[0])


def test_where_a_contradicted_and_a_learned_pair_pull():
    e = 0.2
    far, learned = torch.tensor([-300.0, 300.0], dtype=torch.float64)[:, None]
    for name in ("NaPO", "SymPO", "Hölder-DPO"):
        assert ROWS[name](far, 0.5)[1].item() < 1e-12
    both = torch.cat([far, learned])
    assert dr_dpo(both, 1.0)[1][0].item() < 1e-12  # over its mean, so it takes a batch
    assert ropo(far, 14.0)[1].item() == pytest.approx(4 * 14 / 15**2)
    assert cdpo(far, e)[1].item() == pytest.approx(1 - e)
    assert rdpo(far, e)[1].item() == pytest.approx((1 - e) / (1 - 2 * e))
    assert ipo(2 * far, None)[1].item() > 1.9 * ipo(far, None)[1].item() > 0

    def pull(row, psi):  # -dloss/dψ
        psi = psi.clone().requires_grad_()
        return -torch.autograd.grad(row(psi, e)[0], psi)[0].item()

    assert pull(rdpo, learned) == pytest.approx(BETA * e / (1 - 2 * e))
    assert pull(cdpo, learned) == pytest.approx(-BETA * e)
    turn = torch.tensor([math.log((1 - e) / e) / BETA], dtype=torch.float64)  # p = 1 - ε
    assert pull(cdpo, turn) == pytest.approx(0, abs=1e-12)
    assert pull(ipo, torch.tensor([1 / (2 * BETA)], dtype=torch.float64)) == pytest.approx(0, abs=1e-12)


@given(st.floats(0, 1))
def test_q_scales_the_first_step(q):
    psi = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(ours(psi, q).sum(), psi)
    torch.testing.assert_close(gradient, torch.full_like(gradient, -BETA / 2 * 0.5**q))

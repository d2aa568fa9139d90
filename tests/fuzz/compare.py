"""When a number is right: within twice the error of the same formula in the working dtype, and a few roundings.

``spread`` is how far one rounding of relative size 1, anywhere on the way, moves an entry: sums of absolute values for
products and log-probs, shifts under nudged arguments for the objective. So no tolerance is chosen by hand but ``FEW``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

FEW = 8
"""Roundings that add up at worst, beside those that the plain formula in the working dtype has."""


class Wrong(AssertionError):
    """A number, shape, dtype or memory that is not what it should be."""


@dataclass
class Expected:
    """What an entry should be, in float64, and how far from it may be."""

    exact: Tensor
    plain: Tensor  # the same formula, computed in `work`
    spread: Tensor | float
    work: torch.dtype
    dtype: torch.dtype  # of the result
    coarse: Tensor | float = 0.0  # what is kept on the way in a dtype narrower than `work` may add

    def at(self, part: tuple) -> Expected:
        """Of a part of the result, such as the rows of a rank."""
        shape = self.exact.shape

        def of(x: Tensor | float) -> Tensor:
            return torch.as_tensor(x).expand(shape)[part]

        return Expected(of(self.exact), of(self.plain), of(self.spread), self.work, self.dtype, of(self.coarse))

    def allowed(self) -> Tensor:
        error = (self.plain.double() - self.exact).abs().nan_to_num(0, 0, 0)
        if error.dim() > 1 and error.numel():
            error = error.amax(-1, keepdim=True)
        out = torch.finfo(self.dtype)
        rounding = out.eps * self.exact.abs() + max(out.smallest_normal * out.eps, 1e-37 if out.bits < 64 else 1e-300)
        few = FEW if self.work != torch.float64 else 4 * FEW  # no plain formula shows there what an order of sums costs
        wide = few * torch.finfo(self.work).eps * torch.as_tensor(self.spread)
        return (2 * error + wide + torch.as_tensor(self.coarse) + rounding).nan_to_num(0, 0, 0)


def check(name: str, found: Tensor, right: Expected) -> None:
    if found.shape != right.exact.shape:
        raise Wrong(f"{name} has shape {list(found.shape)}, not {list(right.exact.shape)}")
    if found.dtype != right.dtype:
        raise Wrong(f"{name} is {found.dtype}, not {right.dtype}")
    a, b = found.detach().double(), right.exact
    beyond = b.abs() > torch.finfo(right.dtype).max
    b = torch.where(beyond, b.sign() * torch.inf, b)  # a dtype has no larger number
    for what, test in (("NaN", torch.isnan), ("inf", torch.isposinf), ("-inf", torch.isneginf)):
        if not torch.equal(test(a), test(b)):
            raise Wrong(f"{name} is {what} at {at(test(a))}, should be at {at(test(b))}: {short(a)} for {short(b)}")
    excess = ((a - b).abs() - right.allowed()).nan_to_num(0, 0, 0)
    if excess.numel() and float(excess.max()) > 0:
        worst = int(excess.argmax())
        ours, exact = a.flatten()[worst].item(), b.flatten()[worst].item()
        limit = right.allowed().expand(b.shape).flatten()[worst].item()
        place = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), b.shape)) if b.dim() else ()
        raise Wrong(f"{name}{list(place)} is {ours:.9g}, not {exact:.9g}: off by {abs(ours - exact):.3g} > {limit:.3g}")


def at(mask: Tensor) -> str:
    return str(mask.nonzero().tolist()[:4]) if mask.any() else "nowhere"


def short(x: Tensor) -> str:
    return str([float(f"{v:.4g}") for v in x.flatten()[:6].tolist()])


def exactly(name: str, found: object, right: object) -> None:
    same = torch.equal(found, right) if isinstance(found, Tensor) and isinstance(right, Tensor) else found == right
    if not same:
        raise Wrong(f"{name} is {found}, not {right}")


def storage(x: Tensor) -> Tensor:
    """All the bytes behind a tensor, those between its elements too."""
    return torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())


class Untouched:
    """Arguments as they were, bytes and all; what they are compared with later."""

    def __init__(self, arguments: Mapping[str, Tensor]):
        self.arguments = dict(arguments)
        self.bytes = {name: storage(x.detach()).clone() for name, x in arguments.items()}

    def check(self, results: Iterable[tuple[str, Tensor | None]], written: Iterable[str] = ()) -> None:
        """Nothing was written but what is named, and no result lies in an argument's memory."""
        written = set(written)
        for name, x in self.arguments.items():
            if name not in written and not torch.equal(storage(x.detach()), self.bytes[name]):
                raise Wrong(f"{name} was written over")
        where = {x.untyped_storage().data_ptr(): name for name, x in self.arguments.items() if name not in written}
        for name, x in results:
            if x is not None and x.numel() and x.untyped_storage().data_ptr() in where:
                raise Wrong(f"{name} shares memory with {where[x.untyped_storage().data_ptr()]}")

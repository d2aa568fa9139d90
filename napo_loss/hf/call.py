"""One call of a model under ``fused_head``: its labels, the hidden states seen, and how log-probs reach its output.

What shards a model (FSDP2, ZeRO-3) gathers a layer for backward when a gradient reaches that layer's own output. So the
gradient of the log-probs takes that way: :class:`Take` makes them of the model's logits, to which it sends zeros, and
:class:`Join` has the layer's output, behind which the real gradient waits in a box.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from napo_loss.types import SequenceLogps

COLUMNS = 8
"""Log-probs compared in each position that verifies, the likeliest and the least likely among them."""


@dataclass
class FusedCall:
    labels: Tensor  # [N, T]
    token_weights: Tensor | None = None  # [N, T]
    cu_seqlens: Tensor | None = None
    probes: bool = False  # asks what the model does to its logits, not for log-probs
    hidden: Tensor | None = None  # [N, T, D]; longer where virtual tokens come first
    shown: Tensor | None = None  # [V]: the ramp
    logps: SequenceLogps | None = None
    verification: tuple[Tensor, Tensor, torch.dtype, tuple] | None = None
    box: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self):
        if not isinstance(self.labels, Tensor) or self.labels.dim() != 2:
            given = (
                f"shape {list(self.labels.shape)}" if isinstance(self.labels, Tensor) else type(self.labels).__name__
            )
            raise ValueError(f"labels must be a tensor of shape [N, T], got {given}")
        if self.token_weights is not None and self.token_weights.shape != self.labels.shape:
            raise ValueError(
                f"token_weights must have the shape of labels, {list(self.labels.shape)}, got "
                f"{list(self.token_weights.shape)}"
            )

    def keep(self, hidden: Tensor, name: str, virtual: int = 0) -> None:
        """The hidden states that the output projection is called with."""
        N, T = self.labels.shape
        if hidden.dim() != 3 or hidden.shape[0] != N or hidden.shape[1] not in (T, T + virtual):
            raise NotImplementedError(
                f"{name} calls its output projection with hidden states of shape {list(hidden.shape)}, beside labels "
                f"of shape {[N, T]}: fused_head needs a position for each label"
            )
        self.hidden = hidden

    def one_position(self) -> Tensor:
        """``[N, 1, D]``: one that is read, of each sequence."""
        assert self.hidden is not None
        N, T = self.labels.shape
        ahead = torch.arange(T, device=self.labels.device)
        last = torch.where(self.labels >= 0, ahead, 1).amax(1).to(self.hidden.device)  # the last label that counts
        at = (last - 1 + self.hidden.shape[1] - T).clamp_min(0)
        return self.hidden.detach()[torch.arange(N, device=at.device), at][:, None]

    def flat(self, device: torch.device) -> tuple[Tensor, Tensor, dict[str, Tensor | None]]:
        """Hidden states, labels and the rest: virtual tokens in front predict nothing, packed sequences lie flat."""
        assert self.hidden is not None
        hidden, virtual = self.hidden, self.hidden.shape[1] - self.labels.shape[1]
        labels, weights, cu_seqlens = (
            None if x is None else x.to(device) for x in (self.labels, self.token_weights, self.cu_seqlens)
        )
        assert labels is not None
        if virtual:
            labels = pad(labels, (virtual, 0), value=-100)
            weights = None if weights is None else pad(weights, (virtual, 0))
        if cu_seqlens is not None:
            hidden, labels = hidden.flatten(0, 1), labels.flatten()
            weights = None if weights is None else weights.flatten()
        return hidden, labels, {"token_weights": weights, "cu_seqlens": cu_seqlens}

    def unpadded(self, logps: SequenceLogps) -> SequenceLogps:
        """Without the statistics of virtual tokens."""
        if logps.tokens is None or self.cu_seqlens is not None:
            return logps
        T = self.labels.shape[1]
        return logps._replace(tokens=type(logps.tokens)(*(x[:, -T:] for x in logps.tokens)))

    def verify(self, key: tuple, raw: Tensor, logps: Callable[[Tensor, Tensor], SequenceLogps]) -> None:
        """Notes our log-probs of some columns of the position that the model sees."""
        with torch.no_grad():
            shown = self.one_position()
            columns = _columns(raw)  # [N, k]
            ours = logps(shown.expand(-1, columns.shape[1], -1).reshape(-1, 1, shown.shape[-1]), columns.view(-1, 1))
        self.verification = columns, ours.sum.view(columns.shape), raw.dtype, key


def _columns(raw: Tensor) -> Tensor:
    """Of the layer's output ``[N, 1, V]``: where it is largest and smallest, and some others."""
    raw = raw.full_tensor() if hasattr(raw, "full_tensor") else raw  # pyright: ignore[reportAttributeAccessIssue]
    x = raw[:, -1]
    N, V = x.shape
    others = torch.arange(COLUMNS - 2, device=x.device) * 7919 + torch.arange(N, device=x.device)[:, None] * 104729
    return torch.cat([x.argmax(1, keepdim=True), x.argmin(1, keepdim=True), others % V], 1)


class Join(torch.autograd.Function):
    """The layer's output; the gradient that reaches it is that of the log-probs, which waits in ``box``."""

    @staticmethod
    def forward(ctx, output: Tensor, logps: Tensor, box: dict[str, Tensor]) -> Tensor:
        ctx.box = box
        return output.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Any:
        return None, ctx.box.pop("grad"), None


class Take(torch.autograd.Function):
    """Of the model's logits, the log-probs: backward sends zeros through the model's own code."""

    @staticmethod
    def forward(ctx, logits: Tensor, logps: Tensor, box: dict[str, Tensor]) -> Tensor:
        ctx.box, ctx.like = box, (logits.shape, logits.dtype, logits.device)
        return logps.detach().clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Any:
        ctx.box["grad"] = grad
        shape, dtype, device = ctx.like
        return torch.zeros((), dtype=dtype, device=device).expand(shape), None, None

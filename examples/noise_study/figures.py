"""Three figures, each with one message."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from examples.noise_study.findings import Rows, common, converged, curve, estimate, present, walked, where
from examples.noise_study.plan import AT_ALL_SETTINGS, BETA, MAPPED, RATE, RATES

COLOURS = {
    "DPO": "#4c4c4c", "cDPO": "#9c755f", "rDPO": "#b279a2", "IPO": "#bab0ac", "Dr.DPO": "#eeca3b", "q = 1": "#4c78a8",
    "released": "#f58518", "moment": "#e4572e",
}  # fmt: skip
"""Of the losses that have a line; where ``q = 1`` and ``released`` lie on each other, they are the same."""


def draw(rows: Rows, folder: Path) -> None:
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    swaps = where(rows, task="pictures", noise="swapped")
    _by_rate(swaps, folder / "by_rate.png")
    _maps(swaps, folder / "maps.png")
    _estimators(swaps, folder / "estimators.png")


def _by_rate(rows: Rows, path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained", sharex=True)
    ends = converged(rows)
    for loss in present(rows, COLOURS):
        rates = [rate for rate in RATES if where(ends, loss=loss, rate=rate)]
        shift = 0.12 * (list(COLOURS).index(loss) - 3.5)  # points, so that intervals do not hide each other
        for ax, found in (
            (axes[0], [estimate(r["test"] for r in where(ends, loss=loss, rate=rate)) for rate in rates]),
            (axes[1], [_best_epoch(where(common(rows), loss=loss, rate=rate)) for rate in rates]),
        ):
            ax.errorbar(
                [100 * rate + shift for rate in rates], [100 * e.mean for e in found],
                [100 * e.half_width for e in found], color=COLOURS[loss], label=loss, lw=1.8, elinewidth=0.8,
            )  # fmt: skip
    axes[0].set_title("Trained to the last epoch:\naccuracy on clean questions, %", loc="left")
    axes[1].set_title(
        "Stopped at the best epoch on clean validation\nquestions, which nobody with noisy labels has", loc="left"
    )
    for ax in axes:
        ax.set_xlabel("pairs swapped, %")
        ax.grid(axis="y", color="#e6e6e6", lw=0.7)
        ax.set_axisbelow(True)
    low = min(ax.get_ylim()[0] for ax in axes)
    high = max(ax.get_ylim()[1] for ax in axes)
    for ax in axes:
        ax.set_ylim(low, high)
    axes[1].legend(frameon=False, ncols=2, loc="lower left")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _best_epoch(rows: Rows):
    epochs, valid = curve(rows, "valid")
    best = epochs[int(np.argmax([e.mean for e in valid]))]
    return estimate(row["test"] for row in where(rows, epoch=best))


def _maps(rows: Rows, path: Path) -> None:
    """β × epochs of each loss."""
    losses = present(rows, AT_ALL_SETTINGS)
    figure, axes = plt.subplots(len(MAPPED), len(losses), figsize=(1.25 * len(losses), 3.2), layout="constrained")
    image = None
    for line, rate in zip(np.atleast_2d(axes), MAPPED, strict=True):
        for ax, loss in zip(line, losses, strict=True):
            x = walked(where(rows, loss=loss, rate=rate, learning_rate=RATE))
            betas, epochs = sorted({r["beta"] for r in x}), sorted({r["epoch"] for r in x})
            cells = [
                [100 * np.mean([r["test"] for r in where(x, beta=beta, epoch=e)]) for e in epochs] for beta in betas
            ]
            image = ax.imshow(cells, vmin=50, vmax=90, origin="lower", aspect="auto", cmap="viridis")
            ax.set_xticks(range(len(epochs)), [f"{e:g}" for e in epochs])
            ax.set_yticks(range(len(betas)), [f"{b:g}" for b in betas] if ax is line[0] else [""] * len(betas))
            if rate == MAPPED[0]:
                ax.set_title(loss, fontsize=8)
            else:
                ax.set_xlabel("epochs")
            for i, cell_line in enumerate(cells):
                for j, cell in enumerate(cell_line):
                    ax.text(j, i, f"{cell:.0f}", ha="center", va="center", fontsize=6, color="w" if cell < 75 else "k")
        line[0].set_ylabel(f"{100 * rate:.0f} % swapped\nβ")
    if image is not None:
        figure.colorbar(image, ax=axes, label="accuracy, %", shrink=0.8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _estimators(rows: Rows, path: Path) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    shades = plt.get_cmap("viridis")(np.linspace(0, 0.85, len(RATES)))
    panels = (("q_released", "released q: 1 whatever the noise"), ("q_moment", "moment q (lines: twice the true rate)"))
    x = where(common(rows), loss="DPO", beta=BETA)
    for ax, (column, title) in zip(axes, panels, strict=False):
        for rate, shade in zip(RATES, shades, strict=True):
            epochs, found = curve(where(x, rate=rate), column)
            ax.errorbar(
                epochs, [e.mean for e in found], [e.half_width for e in found], color=shade, label=f"{100 * rate:.0f} %"
            )
            if column == "q_moment":
                ax.axhline(2 * rate, color=shade, lw=0.7, ls=":")
        ax.set_title(title, loc="left")
        ax.set_ylim(-0.02, 1.05)
    for loss in ("DPO", "moment", "q = 1"):
        epochs, found = curve(where(common(rows), loss=loss, rate=0.3), "precision")
        axes[2].errorbar(
            epochs, [e.mean for e in found], [e.half_width for e in found], color=COLOURS[loss], label=loss
        )
    axes[2].axhline(0.3, color="#999999", lw=0.8, ls=":")
    axes[2].set_title("30 % swapped: share of swapped pairs\namong the lowest margins (line: chance)", loc="left")
    axes[2].set_ylim(0, 1.05)
    axes[0].legend(frameon=False, title="pairs swapped", fontsize=8)
    axes[2].legend(frameon=False, title="trained with", fontsize=8)
    for ax in axes:
        ax.set_xscale("log", base=2)
        ax.set_xticks(epochs, [f"{e:g}" for e in epochs])
        ax.set_xlabel("epochs of DPO" if ax is not axes[2] else "epochs")
    figure.savefig(path, dpi=150)
    plt.close(figure)

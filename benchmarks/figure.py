"""Time and extra memory against the active share c and against the length T, for both paths."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.record import Row

PARTS = {"logits": "both", "linear": "trained"}
"""Suites that are drawn, and which of their parts."""

FLOOR_MIB = 0.1  # the axis is logarithmic, and in place some take nothing


def draw(rows: Sequence[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    suites = {s: [r for r in rows if r.suite == s and r.what == part and r.p50] for s, part in PARTS.items()}
    suites = {suite: mine for suite, mine in suites.items() if mine}
    if not suites:
        return
    figure, axes = plt.subplots(len(suites), 4, figsize=(17, 4.4 * len(suites)), squeeze=False, layout="constrained")
    names = dict.fromkeys(r.provider for mine in suites.values() for r in mine)
    colors = dict(zip(names, [*plt.get_cmap("tab10").colors, *plt.get_cmap("Dark2").colors], strict=False))  # pyright: ignore
    for line, (suite, mine) in zip(axes, suites.items(), strict=True):
        first = mine[0]
        family = [r for r in mine if (r.shape, r.N) == (first.shape, first.N)]
        T = max(dict.fromkeys(r.T for r in family), key=lambda T: sum(r.T == T for r in family))
        against_c = [r for r in family if r.T == T]
        c = 0.3 if any(r.c == 0.3 for r in family) else first.c
        against_T = [r for r in family if r.c == c]
        N = f"{suite}, {first.shape}, N={first.N}"
        _draw(line[:2], against_c, "c", f"{N}, T={T}", colors)
        _draw(line[2:], against_T, "T", f"{N}, c={c:g}", colors)
        line[3].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(f"{rows[0].device}; torch {rows[0].torch}; commit {rows[0].commit}", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw(axes, rows: Sequence[Row], name: str, title: str, colors: dict) -> None:
    """Medians with p20 to p80, and memory; a line for each provider, ours thick."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    for provider in dict.fromkeys(r.provider for r in rows):
        mine = sorted((r for r in rows if r.provider == provider), key=lambda r: getattr(r, name))
        style = {"color": colors[provider], "marker": "o", "markersize": 4, "label": provider}
        style["linewidth"] = 2.5 if provider.startswith("napo_loss") else 1.2
        x = [getattr(r, name) for r in mine]
        axes[0].plot(x, [r.p50 for r in mine], **style)
        axes[0].fill_between(
            x, [r.p20 for r in mine], [r.p80 for r in mine], color=colors[provider], alpha=0.15, linewidth=0
        )
        held = [(getattr(r, name), max(FLOOR_MIB, r.extra_bytes / 2**20)) for r in mine if r.extra_bytes is not None]
        axes[1].plot([x for x, _ in held], [y for _, y in held], **style)
    label = {"c": "active share c of the positions", "T": "positions T of a sequence"}[name]
    ticks = sorted({getattr(r, name) for r in rows})
    for axis, unit in zip(axes, ("ms", "MiB beyond inputs and gradients"), strict=True):
        yscale = "log" if any(len(line.get_xdata()) for line in axis.lines) else "linear"
        axis.set(xlabel=label, ylabel=unit, xscale="log", yscale=yscale, title=title)
        axis.title.set_fontsize(8)
        axis.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axis.xaxis.set_minor_formatter(NullFormatter())
        if yscale == "log":
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axis.yaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.3)

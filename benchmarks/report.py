"""The Markdown tables: a few lines of each suite, which docs/benchmarks.md includes; the CSV has every row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from statistics import median

from benchmarks.record import Row

SHOWN_C = 0.1
"""The active share of preference data with long prompts, for the columns that have room for one."""


def tables(rows: Sequence[Row]) -> dict[str, str]:
    """A Markdown text for each suite that has rows."""
    makers = {"logits": logits, "linear": linear, "objective": objective, "end_to_end": end_to_end}
    found = {suite: [row for row in rows if row.suite == suite] for suite in makers}
    return {suite: makers[suite](mine) + "\n" for suite, mine in found.items() if mine}


def logits(rows: list[Row]) -> str:
    both = [row for row in rows if row.what == "both"]
    shapes = _unique([r for r in both if r.p50 is not None] or both, lambda r: (r.shape, r.N, r.T))
    swept = [s for s in shapes if len(_unique(_of(both, s), lambda r: r.c)) > 1][:2] or shapes[:1]
    lines, shown = [], []
    for shape in swept:
        mine = _of(both, shape)
        shown += mine
        active = sorted(_unique(mine, lambda r: r.c))
        at = SHOWN_C if SHOWN_C in active else active[0]
        head = [*(f"c = {c:g}" for c in active), f"memory, c = {at:g}", f"share of floor, c = {at:g}", "rms error, nat"]
        lines += header(f"{_sizes(mine[0])}; {mine[0].dtype}, forward + backward", head)
        for name, theirs in _by_provider(mine):
            cells = {r.c: r for r in theirs}
            errors = [r.logps_error for r in theirs if r.logps_error is not None]
            error = f"{errors[0]:.1g}" if errors else "–"
            mid = cells.get(at)
            share = "–" if mid is None or mid.share_of_floor is None else f"{100 * mid.share_of_floor:.0f} %"
            lines.append(line(name, [*(_time(cells.get(c)) for c in active), _mib(mid), share, error]))
        lines.append("")
    first = swept[0]
    others = [s for s in shapes if s not in swept and (s[0], s[1]) != first[:2]]
    if others:
        names = [name for name, _ in _by_provider([r for r in both if (r.shape, r.N, r.T) in others])]
        lines += header("other heads, forward + backward", names)
        for shape in others:
            mine = _of(both, shape)
            shown += mine
            cells = {r.provider: r for r in mine}
            lines.append(line(f"{_sizes(mine[0])}, c={mine[0].c:g}", [_time(cells.get(name)) for name in names]))
        lines.append("")
    return "\n".join([*lines, _caption(rows, shown)])


def linear(rows: list[Row]) -> str:
    exact = {row.provider: row.logps_error for row in rows if row.what == "accuracy"}
    shapes = _unique([r for r in rows if r.what != "accuracy"], lambda r: (r.shape, r.N, r.T))
    mine = _of(rows, shapes[0])
    trained, frozen = ([r for r in mine if r.what == what] for what in ("trained", "frozen"))
    active = sorted(_unique(trained, lambda r: r.c))
    head = ["rms error, nat", *(f"c = {c:g}" for c in active), *(f"c = {r.c:g}, frozen head" for r in frozen[:1])]
    lines = header(f"{_sizes(mine[0])}; {mine[0].dtype}", head)
    for name, theirs in _by_provider(trained):
        cells = {r.c: r for r in theirs}
        fixed = [_both(r) for r in frozen if r.provider == name] or ["–"] * bool(frozen)
        error = exact.get(name)
        lines.append(
            line(name, [f"{error:.4f}" if error is not None else "–", *(_both(cells.get(c)) for c in active), *fixed])
        )
    return "\n".join([*lines, "", _caption(rows, mine)])


def objective(rows: list[Row]) -> str:
    shapes = _unique(rows, lambda r: r.shape)
    lines = header("forward + backward, host's clock", shapes)
    for name, theirs in _by_provider(rows):
        cells = {r.shape: r for r in theirs}
        lines.append(line(name, [_time(cells.get(s)) for s in shapes]))
    return "\n".join([*lines, "", _caption(rows, rows)])


def end_to_end(rows: list[Row]) -> str:
    lines = header(f"{_sizes(rows[0])}, c={rows[0].c:g}; {rows[0].dtype}", ["a step", "p20 to p80", "memory of a step"])
    for name, theirs in _by_provider(rows):
        row = theirs[0]
        lines.append(line(name, [_time(row), f"{row.p20:.0f} to {row.p80:.0f} ms", _mib(row)]))
    return "\n".join([*lines, "", _caption(rows, rows)])


def goals(rows: Sequence[Row]) -> list[str]:
    """What this library set out to reach from logits on a GPU, and whether these rows do: shares of the floor."""
    ours = [r for r in rows if r.suite == "logits" and r.provider == "napo_loss" and r.p50 is not None and r.active]
    many = [r for r in ours if (r.V or 0) >= 32000 and (r.active or 0) >= 1000]
    few = [r for r in ours if (r.V or 0) >= 32000 and r.N == 2 and 150 <= (r.active or 0) < 1000]
    lines = []
    for goal, mine, case in (
        (0.85, many, "1000 and more active rows"),
        (0.6, few, "one pair, 150 and more active rows"),
    ):
        shares = [(r.share_of_floor, r.name) for r in mine if r.share_of_floor is not None]
        if shares:
            share, name = min(shares)
            lines.append(f"{_met(share >= goal)}: {case}: {goal:.0%} of the floor; least {share:.0%} ({name})")
    best = {r.key[:-1]: r for r in ours if r.c is not None and r.c <= 0.3}
    faster = [
        f"{r.name} at {r.p50 / mine.p50:.2f} times ours"
        for r in rows
        if r.p50 is not None and (mine := best.get(r.key[:-1])) and mine.p50 and r.p50 < mine.p50
    ]
    lines.append(f"{_met(not faster)}: no peer faster at any c ≤ 0.3" + "".join(f"\n  {line}" for line in faster))
    return lines


def _met(reached: bool) -> str:
    return "reached" if reached else "MISSED "


def _of(rows: Sequence[Row], shape: tuple) -> list[Row]:
    return [row for row in rows if (row.shape, row.N, row.T) == shape]


def _unique(rows: Sequence[Row], key: Callable[[Row], object]) -> list:
    return list(dict.fromkeys(key(row) for row in rows))


def _by_provider(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Providers that have a time, in the order of measuring; the others are named in the caption."""
    names = _unique([row for row in rows if row.p50 is not None], lambda r: r.provider)
    return [(name, [row for row in rows if row.provider == name]) for name in names]


def header(first: str, head: Sequence[str]) -> list[str]:
    return [line(first, head), "|---" + "|---:" * len(head) + "|"]


def line(first: str, cells: Sequence[str]) -> str:
    return f"| {' | '.join([first, *cells])} |"


def _sizes(row: Row) -> str:
    D = "" if row.D is None else f"D={row.D}, "
    return f"{row.shape}: N={row.N}, T={row.T}, {D}V={row.V}"


def _time(row: Row | None) -> str:
    if row is None or row.p50 is None:
        return "–"
    return f"{row.p50:.3g} {row.unit}" if row.p50 < 1000 else f"{row.p50:.0f} {row.unit}"


def _mib(row: Row | None) -> str:
    return "–" if row is None or row.extra_bytes is None else f"{max(0, row.extra_bytes) / 2**20:.0f} MiB"


def _both(row: Row | None) -> str:
    return "–" if row is None or row.p50 is None else f"{_time(row)}, {_mib(row)}"


def _caption(rows: Sequence[Row], shown: Sequence[Row]) -> str:
    """The machine, the versions, the spread, and who could not run and why."""
    row = rows[0]
    rates = {r.dtype: r for r in shown if r.copy_gb_s is not None}
    measured = [f"{r.copy_gb_s:.3g} GB/s copied, {r.gemm_tflop_s:.2g} TFLOP/s {kind}" for kind, r in rates.items()]
    spreads = [r.p80 / r.p20 for r in shown if r.p20 and r.p80]
    spread = f"; p80/p20 {median(spreads):.2f} in the median, {max(spreads):.2f} at most" if spreads else ""
    ran = {r.provider for r in shown if r.p50 is not None}
    reasons = sorted((r.provider, r.note) for r in shown if r.provider not in ran)
    absent = [f"{name}: {next(group)[1]}" for name, group in groupby(reasons, key=lambda pair: pair[0])]
    peers = ", ".join(peer for peer in row.peers.split(", ") if not peer.endswith(" missing"))
    machine = "; ".join(
        [row.device, *measured, f"torch {row.torch}, triton {row.triton}, {peers}; commit {row.commit}"]
    )
    missing = f" Not run: {'; '.join(absent)}." if absent else ""
    return f"Medians{spread}. {machine}.{missing}"

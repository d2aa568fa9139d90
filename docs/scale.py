"""Bytes on the wire, as formulas that tests compare with counted collectives; prints the table of parallel.md.

python docs/scale.py
"""

N, T, c, D, K = 8, 4096, 0.3, 4096, 3
A = round(c * N * T)
RANKS = (8, 64, 1024)
VOCABULARIES = (32064, 128256, 256000)


def all_reduce(size: float, ranks: int) -> float:
    """Sent by one rank for an all-reduce of ``size`` bytes: a ring passes everything on twice, but for its own part."""
    return 2 * (ranks - 1) / ranks * size


def gather(size: float, ranks: int) -> float:
    """Sent by one rank for an all-gather into ``size`` bytes, or a reduce-scatter of them."""
    return (ranks - 1) / ranks * size


def global_means(K: int) -> int:
    """The all-reduce behind q and dynamic weights: three means for each negative, and a count."""
    return 4 * 4 * K


def vocabulary_forward(A: int, chunks: int = 1) -> int:
    """The all-reduces of a split vocabulary: three floats of each active position, two that check a chunk's shards."""
    return 12 * A + 8 * chunks


def vocabulary_backward(A: int, D: int) -> int:
    """The all-reduce of the gradient of the hidden states: active positions, in float32."""
    return 4 * A * D


def sequence(N: int) -> int:
    """The all-reduce of a split sequence: sum and length; as much again in backward."""
    return 8 * N


def human(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"


def rows() -> list[tuple[str, list[float]]]:
    def over(size, way=all_reduce):
        return [way(size, ranks) for ranks in RANKS]

    found = [
        (f"q and weights over data-parallel ranks, K = {K}", over(global_means(K))),
        ("sequences split over ranks, both ways", over(2 * sequence(N))),
        ("vocabulary split over ranks, forward", over(vocabulary_forward(A))),
        ("vocabulary split over ranks, backward (a trained backbone)", over(vocabulary_backward(A, D))),
    ]
    for V in VOCABULARIES:
        found.append((f"*instead: bf16 logits gathered, V = {V}*", over(2 * N * T * V, gather)))
    for V in VOCABULARIES:
        found.append((f"*the head sharded by FSDP2 in bf16, V = {V}: two gathers and dW*", over(3 * 2 * V * D, gather)))
    return found


def table() -> str:
    lines = [f"| sent by one rank in a step | {' | '.join(f'{r} ranks' for r in RANKS)} |", "|---" + "|---:" * 3 + "|"]
    lines += [f"| {name} | {' | '.join(map(human, sizes))} |" for name, sizes in rows()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())

"""The benchmark compares like with like, drops nothing silently, and its comparison flags what it should."""

import csv
import math
import os
import re
from dataclasses import replace
from itertools import count, pairwise
from types import SimpleNamespace

import pytest
import torch

from benchmarks import (
    compiled,
    end_to_end,
    figure,
    linear,
    linear_providers,
    logits,
    machine,
    measure,
    objective,
    pipes,
    report,
    runner,
    static,
    traffic,
)
from benchmarks import suite as suites
from benchmarks.__main__ import main
from benchmarks.record import Row, compare, merge, read_rows, write_rows
from benchmarks.sass import Instruction, innermost_loops
from benchmarks.shapes import ACTIVE, MODELS, Shape, linear_shapes, logits_shapes, with_image
from draws import quick
from napo_loss import napo_loss, reference

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
TINY = Shape("tiny", 4, 9, 16, 50, (0.5,))
MISSING = (ImportError, AttributeError, RuntimeError)  # not installed, too old a torch, needs a GPU
pytestmark = pytest.mark.filterwarnings("ignore")  # of the peers


def given(provider, *arguments):
    try:
        return provider(*arguments)
    except MISSING as error:
        pytest.skip(runner.reason(error))


COMPILED = {"torch.compile", "Liger, compiled", "CCE, compiled"}


@pytest.mark.parametrize("name", quick(linear_providers.PROVIDERS.keys() - COMPILED, linear_providers.PROVIDERS))
def test_linear_providers_agree(name):
    sets, labels = linear.make_inputs(TINY, "float32", 1), logits.make_labels(TINY, 0.5)
    results = [given(linear.start(provider, sets, labels, "trained")) for provider in ("eager", name)]
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", quick(logits.PROVIDERS.keys() - COMPILED, logits.PROVIDERS))
def test_logits_providers_agree(name):
    x = torch.randn(TINY.N, TINY.T, TINY.V).to(measure.DEVICE)
    labels = logits.make_labels(TINY, 0.5)
    exact = reference.sequence_logps(x.double(), labels).sum
    torch.testing.assert_close(given(logits.PROVIDERS[name], x, labels).double(), exact, rtol=1e-4, atol=1e-4)
    steps = [given(logits.start(logits.PROVIDERS[p], [x], labels, "both")) for p in ("eager", name)]
    torch.testing.assert_close(*steps, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", quick(objective.PROVIDERS.keys() - COMPILED, objective.PROVIDERS))
@pytest.mark.parametrize("K", [1, 3])
def test_objective_providers_agree(name, K):
    results = [objective.step(objective.PROVIDERS[p], objective.make_inputs(5, K)) for p in ("eager", name)]
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_the_objective_measured_is_that_of_the_library():
    chosen, rejected, ref = objective.make_inputs(5, 1)
    plain = napo_loss(chosen, rejected[0], ref[0], ref[1][0], beta=objective.BETA).losses
    torch.testing.assert_close(objective.eager(chosen, rejected, ref), plain)


def batch_loss(name, folder):
    trainer = end_to_end.make_trainer(end_to_end.QUICK, name, folder)
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        for p in trainer.model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())).to(p))
    return trainer.compute_loss(trainer.model, batch).detach()


@pytest.mark.slow
def test_ligers_step_computes_the_loss_of_dpo(tmp_path):
    pytest.importorskip("liger_kernel")
    plain, liger = (batch_loss(name, tmp_path / name) for name in (end_to_end.TRL, end_to_end.LIGER))
    assert abs(plain - 0.6931) > 1e-3  # the policy has left its reference
    torch.testing.assert_close(liger, plain, rtol=1e-4, atol=1e-5)


def test_the_bare_subclass_computes_the_loss_of_the_trainer(tmp_path):
    ours, bare = (batch_loss(name, tmp_path / name) for name in (end_to_end.OURS, end_to_end.BARE))
    assert abs(ours - 0.5) > 1e-3  # which it is at the start
    torch.testing.assert_close(bare, ours, rtol=1e-5, atol=1e-6)


def test_shapes_are_those_of_the_issue():
    assert MODELS["Llama-3-8B"] == (4096, 128256, 0)
    assert MODELS["Qwen2.5-VL-7B"][:2] == (3584, 152064)
    assert MODELS["Gemma-2-2B"][:2] == (2304, 256000)
    assert MODELS["LLaVA-1.5-7B"] == (4096, 32064, 576)
    image = with_image("LLaVA-1.5-7B", 1)
    assert image.active[0] * image.T == pytest.approx(128, abs=1)
    for shapes in (logits_shapes(quick=False), linear_shapes(quick=False)):
        assert shapes[0].active == ACTIVE == (0.05, 0.1, 0.3, 1.0)
        assert len({s.T for s in shapes if (s.name, s.N) == (shapes[0].name, shapes[0].N)}) >= 3  # the figure's sweep


def test_the_floor_counts_active_rows_once_each_way():
    labels = logits.make_labels(TINY, 0.5)
    active, row = int((labels[:, 1:] != -100).sum()), TINY.V * 2
    floors = {what: logits._row(TINY, 0.5, what).floor_bytes for what in ("forward", "backward", "both")}
    written = TINY.N * TINY.T * row
    assert floors == {"forward": active * row, "backward": active * row + written, "both": 2 * active * row + written}


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="reads the peak memory from Linux's /proc")
def test_extra_memory_is_what_a_step_takes_beyond_what_it_leaves():
    held = []

    def step():
        torch.ones(10 * 2**20, device=measure.DEVICE).sum()  # 40 MiB
        held.append(torch.ones(2**20, device=measure.DEVICE))

    step()
    found = measure.extra_bytes(step, lambda: held[-1].nbytes) / 2**20
    assert 35 < found < 50


def fails():
    raise ValueError("no such luck\nand more")


@pytest.mark.slow
def test_a_failure_in_a_fresh_process_is_raised_here():
    with pytest.raises(ValueError, match="no such luck"):
        measure.in_fresh_process(fails)


def test_steps_take_turns_and_short_ones_are_repeated(monkeypatch):
    ticks, calls = count(), []
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: 1e-5 * next(ticks)))
    found = measure.time_steps({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 0.02, host_clock=True)
    assert all(len(samples) >= measure.FEWEST for samples in found.values())
    assert calls.count("a") > 100  # a sample of less than a millisecond is mostly the clock's
    assert sum(x != y for x, y in pairwise(calls)) >= 3  # whatever a neighbour does, more than one turn
    assert measure.quantiles([3.0]) == (3.0, 3.0, 3.0)
    assert measure.quantiles([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == (2.0, 3.5, 5.0)


CASE = Row("logits", "Llama-3-8B", "", "both", N=2, T=8, V=10, dtype="bfloat16", c=0.1, floor_bytes=1000)


@pytest.fixture
def rates(monkeypatch):
    monkeypatch.setattr(machine, "copy_bandwidth", lambda: 1e6)  # 1000 bytes a millisecond
    monkeypatch.setattr(machine, "gemm_rate", lambda _: 1e12)


def failing_start(name):
    if name == "broken":
        raise RuntimeError("needs a GPU\nand more")
    return lambda: None


def test_a_provider_that_fails_is_a_row_with_its_reason(rates):
    def memory(name):
        raise MemoryError("too little")

    timed = lambda providers: runner.side_by_side(failing_start, providers, 0.001, host_clock=True)  # noqa: E731
    ours, broken = runner.measure(runner.Case(CASE, ("napo_loss", "broken"), timed, memory))
    assert (broken.note, broken.p50) == ("RuntimeError: needs a GPU", None)
    assert ours.p20 <= ours.p50 <= ours.p80
    assert ours.note == "MemoryError: too little"
    assert ours.share_of_floor == pytest.approx(1 / ours.p50)
    for column in ("device", "driver", "torch", "triton", "peers", "commit"):
        assert getattr(ours, column), column
    assert f"torch {torch.__version__}" in report.tables([ours, broken])["logits"]


def fixed(times):
    return lambda providers: dict.fromkeys(providers, times)


def test_a_run_out_of_time_says_what_it_left_out(rates):
    rows = []
    cases = [runner.Case(CASE, ("napo_loss", "eager"), fixed([1.0, 2.0]))]
    assert list(runner.run(cases, limit=-1, rows=rows)) == [CASE]
    assert [row.provider for row in rows] == ["napo_loss", "eager"]
    assert all("not run" in row.note and row.p50 is None for row in rows)


def rows_of(suite="logits", *, p50=10.0, spread=1.0, provider="napo_loss", **kwargs):
    times = {"p20": p50 - spread, "p50": p50, "p80": p50 + spread, "samples": 5}
    return replace(CASE, suite=suite, provider=provider, device="some CPU", **times, **kwargs)


def test_a_csv_comes_back_as_it_was(tmp_path):
    rows = [rows_of(same_bits=True, note='a "quoted", note', extra_bytes=5), rows_of("objective", c=None, N=None)]
    write_rows(tmp_path / "new/rows.csv", rows)
    assert read_rows(tmp_path / "new/rows.csv") == rows
    assert read_rows(tmp_path / "nothing.csv") == []


def test_a_suite_that_ran_replaces_its_rows_and_keeps_the_others():
    old = [rows_of("objective"), rows_of(p50=5.0), rows_of(p50=6.0, c=0.9)]
    new = [rows_of(p50=7.0)]
    assert merge(old, new, ["logits"]) == [new[0], old[0]]
    assert merge(old, new, []) == [new[0], old[2], old[0]]  # interrupted: what it did not reach stays


@pytest.mark.parametrize(
    ("now", "provider", "verdict", "regression"),
    [
        ({"p50": 10.4}, "napo_loss", "", False),
        ({"p50": 11.9}, "napo_loss", "", False),  # the ranges overlap
        ({"p50": 13.0}, "napo_loss", "SLOWER", True),
        ({"p50": 13.0}, "napo_loss, NaPOTrainer", "SLOWER", True),
        ({"p50": 13.0}, "eager", "SLOWER", False),  # a peer's affair
        ({"p50": 5.0}, "napo_loss", "faster", False),
        ({"p50": 10.3, "spread": 0.0}, "napo_loss", "", False),  # beyond the spread, below the tolerance
    ],
)
def test_compare_flags_what_is_slower_beyond_the_spread(now, provider, verdict, regression):
    spread = 0.1 if now.get("spread") == 0.0 else 1.0
    lines, found = compare([rows_of(provider=provider, spread=spread)], [rows_of(**now, provider=provider)])
    assert lines[0].endswith(verdict or provider)
    assert bool(found) == regression


def test_compare_flags_what_no_longer_runs_and_other_devices():
    broken = replace(rows_of(), p20=None, p50=None, p80=None, note="RuntimeError: gone")
    lines, found = compare([rows_of()], [broken])
    assert "FAILS NOW: RuntimeError: gone" in found[0]
    assert compare([rows_of()], [rows_of(c=0.9)]) == ([], [])
    lines, found = compare([rows_of()], [replace(rows_of(), device="another")])
    assert not found
    assert lines[-1] == "not the same device: another; some CPU"


def test_two_files_are_compared_without_a_run(tmp_path, monkeypatch, capsys):
    write_rows(tmp_path / "old.csv", [rows_of()])
    write_rows(tmp_path / "new.csv", [rows_of(p50=20.0)])
    arguments = ["benchmarks", "--compare", str(tmp_path / "old.csv"), "--with", str(tmp_path / "new.csv")]
    monkeypatch.setattr("sys.argv", arguments)
    assert main() == 1
    assert "2.00  logits Llama-3-8B N=2 T=8 c=0.1 both | napo_loss  SLOWER" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["benchmarks", "nonsense"])
    with pytest.raises(SystemExit, match="2"):
        main()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where results go instead of the checkout; nothing is compiled, copied by the gigabyte or run in a new process."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    for cached in (logits._compiled, linear_providers.compiled, objective.compiled):
        cached.cache_clear()
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setattr(suites, "QUICK_LIMIT", math.inf)  # or a busy machine would leave cases out
    machine.describe()
    for module in (logits, linear, end_to_end):
        monkeypatch.setattr(module, "in_fresh_process", lambda function, *given: function(*given))
    monkeypatch.setattr(logits, "cache_bytes", lambda: 1)
    monkeypatch.setattr(linear, "cache_bytes", lambda: 1)
    yield tmp_path / "runs"
    for cached in (logits._compiled, linear_providers.compiled, objective.compiled):
        cached.cache_clear()


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="reads the peak memory from Linux's /proc")
@pytest.mark.parametrize("suite", quick(["objective"], runner.SHARES))
def test_a_quick_run_of_each_suite(suite, folder, rates):
    rows = suites.run_suites([suite], quick=True)
    stem = folder / machine.file_stem()
    assert len(read_rows(stem.with_suffix(".csv"))) == len(rows)
    for row in rows:
        assert row.note or row.p50 is not None or row.what == "accuracy", row.name
    ours = [row for row in rows if row.provider.startswith("napo_loss")]
    assert ours
    assert not any(row.note for row in ours)
    assert stem.with_name(f"{stem.name}-{suite}.md").read_text().startswith("| ")
    if suite in figure.PARTS:
        assert stem.with_suffix(".png").stat().st_size > 10_000
        assert all(row.extra_bytes is not None for row in ours if row.what in ("both", "trained"))


def test_an_interrupt_keeps_what_was_measured(folder, monkeypatch, rates):
    suites.run_suites([], quick=True)
    path = folder / f"{machine.file_stem()}.csv"
    write_rows(path, [rows_of("objective"), rows_of(c=0.9)])

    def interrupted(providers):
        raise KeyboardInterrupt

    cases = [runner.Case(CASE, ("napo_loss",), fixed([1.0])), runner.Case(CASE, ("eager",), interrupted)]
    monkeypatch.setattr(logits, "cases", lambda quick: cases)
    suites.run_suites(["logits"], quick=True)
    assert [(r.suite, r.provider, r.c) for r in read_rows(path)] == [
        ("logits", "napo_loss", 0.1),
        ("logits", "napo_loss", 0.9),
        ("objective", "napo_loss", 0.1),
    ]


def test_goals_are_read_off_the_rows():
    def row(share, active, p50=10.0, provider="napo_loss", **kwargs):
        return replace(rows_of(p50=p50, provider=provider, **kwargs), V=32064, active=active, share_of_floor=share)

    many, few, slower = row(0.9, 1000), row(0.61, 200, c=0.05), row(0.5, 1000, p50=11.0, provider="eager")
    assert [line.split(":")[0] for line in report.goals([many, few, slower])] == ["reached"] * 3
    lines = report.goals(
        [replace(many, share_of_floor=0.8), replace(few, share_of_floor=0.5), replace(slower, p50=9.0)]
    )
    assert [line.split(":")[0] for line in lines] == ["MISSED "] * 3
    assert "eager at 0.90 times ours" in lines[2]


def test_a_table_is_pasted_where_a_page_names_it(tmp_path):
    page = tmp_path / "docs/page.md"
    page.parent.mkdir()
    marker = "<!-- ../results/cpu.md -->"
    page.write_text(f"before\n\n{marker}\nold\n{marker}\n\nafter\n")
    for _ in range(2):
        suites.paste(page, tmp_path / "results/cpu.md", "| new |\n")
        suites.paste(page, tmp_path / "results/gpu.md", "| other |\n")
    assert page.read_text() == f"before\n\n{marker}\n\n| new |\n\n{marker}\n\nafter\n"


def test_tables_show_every_provider_or_its_reason():
    cells = [rows_of(c=c, provider=p, extra_bytes=2**20) for c in (0.1, 1.0) for p in ("napo_loss", "eager")]
    broken = [replace(CASE, c=c, provider="CCE", note="no such thing") for c in (0.1, 1.0)]
    text = report.tables(cells + broken)["logits"]
    assert "| napo_loss | 10 ms | 10 ms | 1 MiB | – | – |" in text
    assert "Not run: CCE: no such thing." in text


def test_the_committed_results_are_of_this_form():
    for path in (machine.ROOT / "benchmarks/results").glob("*.csv"):
        with path.open(newline="") as file:
            header = next(csv.reader(file))
        if "suite" in header:
            assert {row.suite for row in read_rows(path)} <= set(runner.SHARES)
        else:
            assert path.stem in ("static", "traffic")


@pytest.mark.slow
@pytest.mark.skipif(measure.GPU, reason="counts in Triton's interpreter")
def test_no_more_bytes_are_moved_than_committed():
    committed = static.committed_traffic()
    found = traffic.count(shares=(0.1,))
    assert {row.case for row in found} <= committed.keys()
    assert static.compare_traffic(found, committed) == ([], [])
    assert not any(map(static.too_much, found))


@pytest.mark.skipif(measure.GPU, reason="counts in Triton's interpreter")
def test_the_traffic_that_is_counted_is_what_a_kernel_touches():
    from napo_loss.kernels.linear_rows import linear_rows

    x, targets = torch.zeros(3, 100), torch.zeros(3, dtype=torch.int64)
    with traffic.Counter() as counter:
        linear_rows(x, targets, x, bias=None, logit_scale=1.0, softcap=0.0)
    assert counter.read == 2 * x.nbytes + targets.nbytes + 3 * 4  # float32 twice; the label's logit once more
    assert counter.written == x.nbytes + 3 * 4 + 3 * 4 * 4  # its gradient; hit, peak, log-total and scale of each row


def sass(text):
    """From lines like ``@P0 LDG.E.128 R4,[R2]``; a branch names the index of the instruction that it goes to."""
    code = []
    for line in text.split("; "):
        predicate, line = ("@P0", line[4:]) if line.startswith("@P0 ") else ("", line)
        opcode, _, operands = line.partition(" ")
        code.append(Instruction(predicate, opcode, hex(16 * int(operands)) if opcode == "BRA" else operands))
    return code


def test_the_innermost_loops_are_found():
    nested = sass("MOV a; FADD b; LDG.E.128 c; @P0 BRA 1; STG.E.64 d; @P0 BRA 0; EXIT")
    assert [[x.opcode for x in body] for body in innermost_loops(nested)] == [["FADD", "LDG.E.128", "BRA"]]
    moved_out_of_the_way = sass("@P0 BRA 4; FADD a; EXIT; NOP; FMUL b; BRA 1")
    assert innermost_loops(moved_out_of_the_way) == []
    two = sass("FADD a; @P0 BRA 0; FMUL b; @P0 BRA 5; FFMA c; MUFU d; @P0 BRA 2; EXIT")
    assert [len(body) for body in innermost_loops(two)] == [2, 5]


def test_a_loop_is_counted_per_element_of_what_it_reads():
    loop = sass("LDG.E.128 a; LDG.E.128 b; FADD c; FFMA2 d; MUFU.EX2 e; BAR.SYNC f; STG.E.128 g; @P0 BRA 0")
    found = pipes.count_code(loop, pipes.Element(read=4, written=2, lane=0))
    assert (found.elements, found.instructions, found.mufu, found.barriers) == (8, 1, 1 / 8, 1)
    assert (found.read, found.written) == (4, 2)
    assert found.lanes == pytest.approx({"issue": 1, "fma": 3 / 8, "xu": 1 / 8, "lsu": 3 / 8, "l1": 6})
    either = sass("@P0 LDG.E.128 a; LDG.E.64 b; @P0 BRA 0")
    assert pipes.count_code(either, pipes.Element(4, 0, 0)).elements == 6


def test_a_share_is_that_of_the_busiest():
    gpu = pipes.Gpu("sm_0", multiprocessors=100, clock=1.0, copy=1.6, fma_lanes=128, latency=1000)
    assert gpu.bytes_a_clock == pytest.approx(16)
    count = pipes.Count(8, 1, 1, 0, read=4, written=4, lanes={"issue": 8, "xu": 1})
    assert count.share(gpu, resident_warps=64) == pytest.approx(0.5 * 16)  # 1/16 clock an element: both pipes alike
    assert count.share(gpu, resident_warps=1) == pytest.approx(0.5 * 256 / 1000)  # loads in flight
    assert gpu.resident_warps(registers=64, num_warps=4) == 32
    assert gpu.resident_warps(registers=16, num_warps=1) == 32  # as many programs as there may be


def test_the_table_of_instructions_is_the_committed_one():
    """The worst of all contiguous cases without a bias or token statistics."""
    page = (machine.ROOT / "docs/benchmarks.md").read_text()
    table = dict(re.findall(r"^\| `(l\w+)` \| (.*) \|$", page, re.MULTILINE))
    with (machine.ROOT / "benchmarks/results/static.csv").open(newline="") as file:
        found = [r for r in map(compiled.Report.from_row, csv.DictReader(file)) if r.code.instructions_per_element]
    plain = [r for r in found if not any(word in r.case for word in ("strided", "bias", "statistics"))]
    assert {r.kernel.removesuffix("_kernel") for r in plain} == set(table)
    for name, cells in table.items():
        of_kernel = [r for r in plain if r.kernel == f"{name}_kernel"]
        most = {
            soft: [r.code.instructions_per_element for r in of_kernel if ("softcap" in r.case) == soft]
            for soft in (0, 1)
        }
        shares = [
            min(share for r in of_kernel if (share := getattr(r.code, f"share_{gpu}")) is not None)
            for gpu in ("a100", "h100", "h200", "b200")
        ]
        expected = [max(most[0]), *([max(most[1])] if most[1] else []), *shares]
        assert [float(x) for x in cells.split(" | ") if x != "–"] == pytest.approx(expected, abs=0.051)
        assert not any(r.code.barriers_per_iteration for r in of_kernel)


def test_kernels_that_got_worse_fail():
    code = compiled.Code(32, 0, 0, 16, 16, 6.0, 1.0, 0, share_h100=2.5)
    fine = compiled.Report("k", "case", "sm_90", code)
    assert compiled.Report.from_row(dict(zip(fine.columns(), fine.row(), strict=True))) == fine
    committed = {fine[:3]: code}
    assert static.compare_compiled([fine], committed) == ([], [])
    worse, notes = static.compare_compiled([fine._replace(code=code._replace(registers=40))], committed)
    assert (worse, len(notes)) == ([], 1)
    changes = {
        "spills": 8, "load_bytes": 8, "store_bytes": 4, "instructions_per_element": 6.3, "barriers_per_iteration": 1,
    }  # fmt: skip
    for name, value in changes.items():
        assert len(static.compare_compiled([fine._replace(code=code._replace(**{name: value}))], committed)[0]) == 1
    assert "new" in static.compare_compiled([fine._replace(case="other")], committed)[1][0]


def test_kernels_that_move_more_fail():
    row = traffic.Traffic("from logits, some case", 100, 50, 140)
    assert static.compare_traffic([row], {row.case: 150}) == ([], [])
    assert len(static.compare_traffic([row], {row.case: 149})[0]) == 1
    assert not static.too_much(row)
    assert static.too_much(row._replace(floor=130))

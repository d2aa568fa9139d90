"""README and the pages stay true: their code runs, their links lead somewhere, their tables are those of the files."""

import copy
import importlib
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import scale

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/*.md"))


def read(name: str) -> str:
    return (ROOT / name).read_text()


def blocks(text: str, language: str = "python") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def run(*code: str) -> dict:
    """The names that are left after these blocks ran one after the other."""
    namespace: dict = {}
    for block in code:
        exec(compile(block, "code block", "exec"), namespace)
    return namespace


def table(text: str, first: str) -> list[list[str]]:
    """The rows, as cells, of the table whose header begins with ``first``."""
    lines = text[text.index(f"| {first}") :].split("\n\n")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip().strip("|").split(" |")] for line in lines]
    return [rows[0], *rows[2:]]


def test_readme_is_one_screen():
    assert len(README.splitlines()) <= 120


@pytest.mark.parametrize("number", range(len(blocks(README))))
def test_every_block_of_readme_runs_alone(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(blocks(README)[number])
    assert not list(tmp_path.iterdir())


def test_the_first_block_prints_what_readme_shows(capsys):
    found = run(blocks(README)[0])
    assert found["logits"].grad is not None
    assert capsys.readouterr().out == blocks(README, "text")[0]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(read(page))])
def test_the_blocks_of_a_page_run_one_after_the_other(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = run(*blocks(read(page)))
    if page == "docs/parallel.md":
        plain = found["linear_sequence_logps"](found["hidden"], found["weight"], found["labels"]).pairs()
        torch.testing.assert_close(found["chosen"], plain[0])
        assert found["q"].dim() == 0


def hook(namespace: dict, *further):
    """Calls the pasted hook as a trainer's method; the losses are added to in place, as LLaMA-Factory does."""
    logps = [torch.tensor([-10.0, -12.0], requires_grad=i < 2) for i in range(4)]
    losses, chosen, rejected = namespace["dpo_loss"](SimpleNamespace(beta=0.1), *logps, *further)
    losses += 1.0
    losses.mean().backward()
    return logps[0].grad is not None and losses.shape == chosen.shape == rejected.shape == (2,)


# What each line of the table of trainers gives, where it can be told without the trainer.
TRAINERS = {
    "TRL ≥ 0.29": lambda n: issubclass(n["NaPOTrainer"], importlib.import_module("trl").DPOTrainer),
    "TRL 0.20 to 0.28": lambda n: hook(n, "sigmoid", {}),
    "LLaMA-Factory": lambda n: hook(vars(n["CustomDPOTrainer"])),
    "ms-swift": lambda n: hook(n, "sigmoid", {}) and n["TrainerFactory"].TRAINER_MAPPING == {"dpo": "plugin.Trainer"},
    "OpenRLHF": lambda n: n["trainer"].loss_fn(*n["logps"])[0].shape == (),
    "torchtune": lambda n: isinstance(n["component"]()(*n["logps"]).losses, torch.Tensor),
    "Lightning, accelerate, your loop": lambda n: n["loss"].shape == (),
    "NeMo-RL": lambda n: (n["_"].losses == 0).tolist() == [False, True],
    "muffin, the paper's": lambda n: n["dpo_loss"](*n["logps"], beta=0.1)[0].shape == (2,),
}


@pytest.mark.parametrize("name", TRAINERS)
def test_the_line_for_a_trainer_does_what_it_says(name):
    rows = dict(table(README, "trainer")[1:])
    assert set(rows) == set(TRAINERS)
    code = re.findall(r"`([^`]+)`", rows[name])[0]
    namespace = run(next(block for block in blocks(README) if "def dpo_loss" in block))
    namespace |= vars(importlib.import_module("napo_loss"))
    two = torch.tensor([-10.0, -12.0])
    namespace |= {"logps": [two] * 4, "chosen": two, "rejected": two, "counts": torch.tensor([True, False])}
    namespace |= {"group": None, "trainer": SimpleNamespace(), "page": read("docs/trainers.md")}
    namespace |= {"CustomDPOTrainer": type("T", (), {}), "TrainerFactory": SimpleNamespace(TRAINER_MAPPING={})}
    if name == "torchtune":
        module, _, thing = code.removeprefix("_component_: ").rpartition(".")
        namespace["component"] = getattr(importlib.import_module(module), thing)
    elif name == "NeMo-RL":
        namespace["_"] = eval(code, namespace)
    elif not code.isidentifier():
        exec(code, namespace)
    assert TRAINERS[name](namespace)


def test_the_subclass_for_trl_computes_the_loss_of_ours(tmp_path):
    from trl import DPOConfig

    import tiny
    from napo_loss.trl import NaPOConfig, NaPOTrainer

    theirs = next(block for block in blocks(read("docs/trainers.md")) if "class Trainer" in block)
    policy, reference = tiny.llama(), tiny.llama()
    with torch.no_grad():
        for weight in reference.parameters():
            weight += 0.01
    dataset = tiny.text_pairs().select_columns(["prompt", "chosen", "rejected"])
    losses = []
    for trainer, config in ((run(theirs)["Trainer"], DPOConfig), (NaPOTrainer, NaPOConfig)):
        arguments = config(str(tmp_path), report_to="none", bf16=False, gradient_checkpointing=False, use_cpu=True)
        models = copy.deepcopy(policy), copy.deepcopy(reference)
        made = trainer(*models, args=arguments, train_dataset=dataset, processing_class=tiny.tokenizer())
        batch = made.data_collator([made.train_dataset[i] for i in range(len(dataset))])
        losses.append(made.compute_loss(made.model, batch))
        losses[-1].backward()
    torch.testing.assert_close(losses[0], losses[1])


def test_the_published_run_has_the_settings_of_its_table(tmp_path, monkeypatch):
    from trl import DPOConfig

    monkeypatch.chdir(tmp_path)
    page = read("docs/reproduce.md")
    config = run(blocks(page)[0])["config"]
    theirs = DPOConfig("out", use_cpu=True)
    for row in table(page, "setting")[1:]:
        name = row[0].strip("`")
        values = [getattr(getattr(c, name), "value", getattr(c, name)) for c in (config, theirs)]
        assert [row[1], row[3].partition(";")[0]] == [str(value) for value in values], name
    assert config.get_warmup_steps(1000) == 100
    assert (-(-83_132 // 32)) * config.num_train_epochs == 10_392  # what the page says of the batch


def test_the_published_run_takes_a_step_on_a_toy(tmp_path, monkeypatch):
    from datasets import Dataset

    import tiny
    from napo_loss import RELEASED
    from napo_loss.trl import NaPOTrainer

    monkeypatch.chdir(tmp_path)
    config = run(blocks(read("docs/reproduce.md"))[0])["config"]
    config.max_steps, config.save_strategy, config.learning_rate = 2, "no", 1e-2
    model = tiny.llava()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    reference = copy.deepcopy(model)
    (frozen,) = re.findall(r"^model\.model\.(\w+)\.requires_grad_\(False\)", read("docs/reproduce.md"), re.MULTILINE)
    getattr(model.model, frozen).requires_grad_(False)
    (columns,) = re.findall(r"^columns = (\[.*\])$", read("docs/reproduce.md"), re.MULTILINE)
    rows = [{**row, "image": row["images"][0]} for row in tiny.vision_pairs(8)]
    dataset = Dataset.from_list(rows).select_columns(json.loads(columns))
    trainer = NaPOTrainer(model, reference, config, train_dataset=dataset, processing_class=tiny.processor())
    trainer.train()
    assert dict(trainer.recipe.named) == dict(RELEASED.named)
    assert trainer.recipe.weights == "dynamic"
    for name, p in trainer.model.named_parameters():
        if frozen in name:
            assert torch.equal(p, before[name]), name
    assert any(not torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())


def anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", ["README.md", "DESIGN.md", "CONTRIBUTING.md", "CHANGELOG.md", *PAGES])
def test_every_link_leads_somewhere(name):
    for target in re.findall(r"\]\((?!http)([^)]+)\)", read(name)):
        file, _, anchor = target.partition("#")
        path = (ROOT / name).parent / file if file else ROOT / name
        assert path.exists(), target
        assert not anchor or anchor in anchors(path.read_text()), target


def test_the_site_shows_every_page():
    listed = re.findall(r": (\S+\.md)$", read("mkdocs.yml"), re.MULTILINE)
    assert {f"docs/{name}" for name in listed} >= set(PAGES)


PASTED = re.findall(r"<!-- \.\./(\S+\.md) -->", read("docs/benchmarks.md"))[::2]  # by `python -m benchmarks`


@pytest.mark.parametrize("path", PASTED)
def test_tables_are_those_of_the_files(path):
    assert read(path).strip() in read("docs/benchmarks.md"), f"the table differs from {path}: paste it again"


def test_every_table_of_the_cpu_is_shown():
    tables = ROOT.glob("benchmarks/results/x86_64-CPU-*.md")
    assert sorted(path.relative_to(ROOT).as_posix() for path in tables) == sorted(PASTED)


def test_the_table_on_parallel_is_what_its_script_prints():
    assert scale.table() in read("docs/parallel.md"), "run python docs/scale.py and paste the table again"


def test_the_benchmark_of_readme_is_a_row_of_its_file():
    head, row = table(README, "SmolLM2-135M")
    measured = table(read("benchmarks/results/x86_64-CPU-linear.md"), "SmolLM2-135M: N=2, T=192")
    column = measured[0].index("c = 0.3")
    assert head[0].startswith("SmolLM2-135M, 2 × 192 tokens, c = 0.3")
    assert row[1:] == [next(r[column] for r in measured[1:] if r[0] == name) for name in head[1:]]


def test_the_table_of_alpha_is_the_rule_solved_for_the_margin():
    head, *rows = table(read("docs/choosing.md"), "α")
    for row in rows:
        for name, cell in zip(head[2:], row[2:], strict=True):
            q = float(re.findall(r"[\d.]+", name)[0])
            assert cell.split()[0] == f"{math.log(2 / q - 1) / float(row[0]):.3g}"


def test_the_estimators_on_the_method_page_are_those_of_the_code():
    from napo_loss import noise_level
    from napo_loss.objective.estimators import BOUNDS

    zero, far = torch.zeros(2), torch.full((2,), 1e6)
    for name, _, bounds, start, end in table(read("docs/method.md"), "`estimator`")[1:]:
        name = name.split('"')[1]
        assert bounds == str([int(x) if x == 1 else x for x in BOUNDS[name]])
        assert float(start) == noise_level(zero, estimator=name).item()
        if name != "moment":
            assert float(end) == pytest.approx(noise_level(far, estimator=name).item())


def test_the_numbers_on_the_method_page():
    from napo_loss import noise_level
    from napo_loss.objective import eager

    page = read("docs/method.md")

    def q(*means, estimator="released", **kwargs):
        return noise_level(torch.tensor(means, dtype=torch.float32), estimator=estimator, **kwargs).item()

    assert "takes 201 nats of mean margin to go from 0.5 to 0.45 and" in page
    assert "1099 to 0.25; α = 0.5 on per-token means takes 4 and 22 nats per token" in page
    for alpha, nats, expected in ((0.01, 201, 0.45), (0.01, 1099, 0.25), (0.5, 4, 0.45), (0.5, 22, 0.25)):
        assert round(q(nats, estimator="paper", alpha=alpha * 0.1), 3) == pytest.approx(expected, abs=6e-4)
    assert "a released q of 1 and 0.04; the mean of the qs is 0.52, the q of all pairs 0.24" in page
    found = q(0.0), q(400.0), (q(0.0) + q(400.0)) / 2, q(0.0, 400.0)
    assert [round(x, 2) for x in found] == [1, 0.04, 0.52, 0.24]
    draw = torch.Generator().manual_seed(0)
    spread = 1 + torch.randn(100_000, generator=draw)
    assert "0.29 for $v = 1$" in page
    assert noise_level(spread, estimator="moment").item() == pytest.approx(0.29, abs=0.01)
    flips = 1 - 2 * (torch.rand(4000, 32, generator=draw) < 0.25).float()
    assert "which is 0.15 for 32 pairs and a quarter flipped" in page
    assert noise_level(flips, estimator="moment").std().item() == pytest.approx(0.15, abs=0.01)
    assert (eager.WEIGHT_FLOOR, eager.WEIGHT_PRIOR) == (0.01, 0.05)
    assert r"\max\Bigl(0.01," in page
    assert r"\epsilon = 0.05\ \text{nat}" in page

"""The file of answers alone: cut at any byte, or on a disk that is full at any byte, it never has a wrong one."""

import json

import pytest

from disk import disk_of
from napo_loss.bias.cache import AnswerCache

pytest.importorskip("filelock")

ANSWERS = ["a cat", "", 'with "quotes"\n', "ψ", "the last"]


def cache(folder, temperature=0.0):
    run = {"temperature": temperature, "model": "0123", "seed": 0}
    return AnswerCache(folder / "image_only.jsonl", run, batch_size=2, total=len(ANSWERS))


def fill(found: AnswerCache) -> None:
    """What is missing, in batches of two, as the caller does."""
    with found.writer() as (answers, append):
        while len(answers) < len(ANSWERS):
            append(ANSWERS[len(answers) : len(answers) + 2])


def whole_of(folder, temperature) -> bytes:
    fill(cache(folder, temperature))
    assert cache(folder, temperature).read() == ANSWERS
    return cache(folder, temperature).path.read_bytes()


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_cut_at_every_byte(temperature, tmp_path):
    whole, found = whole_of(tmp_path, temperature), cache(tmp_path, temperature)
    for size in range(len(whole)):
        found.path.write_bytes(whole[:size])
        known = found.read()
        assert known == ANSWERS[: len(known)]
        assert temperature == 0 or len(known) in (0, 2, 4, 5)  # whole batches, which have one seed each
        fill(found)
        assert found.path.read_bytes() == whole


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_disk_that_is_full_at_every_byte(temperature, tmp_path):
    whole, found = whole_of(tmp_path, temperature), cache(tmp_path, temperature)
    for size in range(len(whole)):
        found.path.unlink()
        with disk_of(size), pytest.raises(OSError, match=r"answers so far are kept.*image_only\.jsonl"):
            fill(found)
        assert found.path.read_bytes() == whole[:size]
        fill(found)
        assert found.path.read_bytes() == whole
    lines = [json.loads(line) for line in whole.splitlines()]
    assert [line[1] for line in lines[1:]] == ANSWERS

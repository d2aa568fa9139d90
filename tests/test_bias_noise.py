"""Which negatives are in fact right: exact match, and the token F1 of SQuAD."""

import pytest

datasets = pytest.importorskip("datasets")
from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from napo_loss.bias import natural_noise, token_f1  # noqa: E402

WORDS = ["the", "a", "bear", "Bear,", "red", "sofa.", "on", "!", "two"]
ANSWERS = st.lists(st.sampled_from(WORDS), max_size=8).map(" ".join)


def turn(text):
    return [{"role": "assistant", "content": [{"type": "text", "text": text}]}]


def test_exact():
    data = {"chosen": [turn("A bear."), turn("two")], "image_only": [turn("a  BEAR"), turn("three")]}
    assert natural_noise(datasets.Dataset.from_dict(data)) == {"image_only": 0.5}
    with pytest.raises(ValueError, match="kinds"):
        natural_noise(datasets.Dataset.from_dict({"chosen": ["x"]}))


@pytest.mark.parametrize(
    ("answer", "other", "expected"),
    [
        ("A bear sits.", "the bear sits", 1.0),
        ("red bear", "bear, red!", 1.0),  # order does not count
        ("a red bear on the sofa", "a blue bear on the sofa", 2 * 3 / 8),
        ("bear bear", "bear", 2 * 1 / 3),  # bags: a token counts as often as both have it
        ("red", "blue", 0.0),
        ("the", "", 1.0),  # nothing is left of either
        ("the", "bear", 0.0),
        ("theory", "ory", 0.0),  # articles are words, not letters
        ("don't", "dont", 1.0),
    ],
)
def test_f1(answer, other, expected):
    assert token_f1(answer, other) == pytest.approx(expected)
    assert token_f1(other, answer) == token_f1(answer, other)


@given(ANSWERS, ANSWERS)
def test_f1_is_squads_mean_of_precision_and_recall(answer, other):
    def bag(text):
        words = "".join(c for c in text.lower() if c not in ",.!").split()
        return sorted(word for word in words if word not in ("the", "a"))

    a, b = bag(answer), bag(other)
    rest, common = list(b), 0
    for word in a:
        if word in rest:
            rest.remove(word)
            common += 1
    if not a or not b:
        expected = float(a == b)
    elif common == 0:
        expected = 0.0
    else:
        precision, recall = common / len(a), common / len(b)
        expected = 2 * precision * recall / (precision + recall)
    assert token_f1(answer, other) == pytest.approx(expected)


@given(st.lists(st.tuples(ANSWERS, ANSWERS), min_size=1, max_size=5))
def test_f1_never_counts_less_than_exact_and_more_as_the_threshold_falls(pairs):
    chosen, negatives = (list(x) for x in zip(*pairs, strict=True))
    data = datasets.Dataset.from_dict({"chosen": chosen, "question_only": negatives})
    exact = natural_noise(data)["question_only"]
    shares = [natural_noise(data, match="f1", threshold=t)["question_only"] for t in (1.0, 0.8, 0.5, 0.01)]
    assert [exact, *shares] == sorted([exact, *shares])
    assert exact == sum(natural_noise(data.select([i]))["question_only"] for i in range(len(data))) / len(data)


def test_f1_of_conversations():
    data = {"chosen": [turn("A bear sits on the old red sofa."), turn("two cats")]}
    data |= {"image_only": [turn("a bear sits on a red sofa"), turn("two")], "question_only": [turn("sofa"), turn("2")]}
    data = datasets.Dataset.from_dict(data)
    assert natural_noise(data) == {"question_only": 0.0, "image_only": 0.0}
    assert natural_noise(data, match="f1") == {"question_only": 0.0, "image_only": 0.5}
    assert natural_noise(data, ["image_only"], match="f1", threshold=0.6) == {"image_only": 1.0}


@pytest.mark.parametrize("kwargs", [{"match": "f2"}, {"match": "f1", "threshold": 0.0}, {"threshold": 1.1}])
def test_bad_input(kwargs):
    data = datasets.Dataset.from_dict({"chosen": ["x"], "image_only": ["x"]})
    with pytest.raises(ValueError, match=[*kwargs][-1]):
        natural_noise(data, **kwargs)


def test_no_rows():
    assert natural_noise(datasets.Dataset.from_dict({"chosen": [], "image_only": []})) == {"image_only": 0.0}

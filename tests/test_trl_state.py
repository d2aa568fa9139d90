"""The file beside a checkpoint that q's history is in: kept whole, and believed only where it can be true."""

import json

import pytest
import torch

from disk import disk_of

pytest.importorskip("trl")

from napo_loss.trl.state import STATE_FILE, load_moments, save_moments

NAMES, CPU = ["rejected", "image_only"], torch.device("cpu")


def load(folder, **options):
    return load_moments(str(folder), NAMES, CPU, **{"smoothed": True, **options})


@pytest.mark.parametrize(
    "values", [[[1.0, -2.0], [3.0, 4.5]], [[0.0, 0.0], [0.0, 0.0]], [[torch.inf, 1.0], [torch.inf, 2.0]]]
)
def test_what_was_saved_is_loaded(values, tmp_path):
    moments = torch.tensor(values)
    save_moments(tmp_path, NAMES, moments)
    assert torch.equal(load(tmp_path), moments)
    assert [path.name for path in tmp_path.iterdir()] == [STATE_FILE]


def test_float32_rounding_is_no_fault(tmp_path):
    margin = torch.full((64,), 123.456)
    save_moments(tmp_path, NAMES, torch.stack([margin[:2], margin[:2] ** 2 * (1 - 1e-6)]))
    assert load(tmp_path) is not None


@pytest.mark.parametrize("room", [0, 7])
def test_the_old_file_stays_where_writing_fails(room, tmp_path):
    save_moments(tmp_path, NAMES, torch.zeros(2, 2))
    with disk_of(room), pytest.raises(OSError, match=f"the moments that q is read from are not saved.*{STATE_FILE}"):
        save_moments(tmp_path, NAMES, torch.ones(2, 2))
    assert torch.equal(load(tmp_path), torch.zeros(2, 2))
    assert [path.name for path in tmp_path.iterdir()] == [STATE_FILE]


def test_nothing_is_left_where_the_last_step_fails(tmp_path, monkeypatch):
    save_moments(tmp_path, NAMES, torch.zeros(2, 2))
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match=f"No space left on device: .*{STATE_FILE}"):
        save_moments(tmp_path, NAMES, torch.ones(2, 2))
    assert torch.equal(load(tmp_path), torch.zeros(2, 2))
    assert [path.name for path in tmp_path.iterdir()] == [STATE_FILE]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no JSON"),
        ('{"moments": {"rejected": [1.0, 2', "is no JSON"),
        ("\udcff", "is no JSON"),
        ("[]", "must hold"),
        ('{"q": {"rejected": 0.5}}', "must hold"),
        ('{"moments": [1, 2]}', "must hold"),
        ('{"moments": {"rejected": [0, 1]}}', "holds moments for"),
        ('{"moments": {"rejected": [0, 1], "image_only": 0.5}}', "moments of 'image_only' must be"),
        ('{"moments": {"rejected": [0, 1], "image_only": [0.5]}}', "moments of 'image_only' must be"),
        ('{"moments": {"rejected": [0, 1], "image_only": ["0", 1]}}', "moments of 'image_only' must be"),
        ('{"moments": {"rejected": [0, 1], "image_only": [true, 1]}}', "moments of 'image_only' must be"),
        ('{"moments": {"rejected": [0, 1], "image_only": [5, 1]}}', "no margins have the mean 5"),
        ('{"moments": {"rejected": [0, -1], "image_only": [0, 1]}}', "no margins have the mean 0"),
    ],
)
def test_a_torn_or_foreign_file_is_named(text, message, tmp_path):
    (tmp_path / STATE_FILE).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=message) as raised:
        load(tmp_path)
    assert str(tmp_path / STATE_FILE) in str(raised.value)


def test_every_torn_prefix_is_an_error(tmp_path):
    save_moments(tmp_path, NAMES, torch.tensor([[1.5, -2.0], [3.0, 4.5]]))
    whole = (tmp_path / STATE_FILE).read_bytes()
    json.loads(whole)
    for size in range(len(whole)):
        (tmp_path / STATE_FILE).write_bytes(whole[:size])
        with pytest.raises(ValueError, match=STATE_FILE):
            load(tmp_path)


def test_a_missing_file_is_told_where_it_matters(tmp_path):
    with pytest.warns(UserWarning, match="start anew"):
        assert load(tmp_path) is None
    assert load(tmp_path, smoothed=False) is None
    assert load_moments(None, NAMES, CPU, smoothed=True) is None

"""NaPO in TRL.

from napo_loss.trl import NaPOConfig, NaPOTrainer

trainer = NaPOTrainer(model, args=NaPOConfig(output_dir="out"), train_dataset=pairs)
trainer.train()
"""

from importlib.metadata import PackageNotFoundError, version

NEEDED = "1.16"
"""The TRL for which the trainer is written: it overrides methods that are not public."""

try:
    found = version("trl")
except PackageNotFoundError as error:
    raise ImportError('napo_loss.trl needs TRL: pip install "napo-loss[trl]"') from error

from packaging.version import Version  # noqa: E402  comes with what TRL needs

if Version(found).release < Version(NEEDED).release:
    raise ImportError(
        f"napo_loss.trl needs TRL {NEEDED} or newer, found {found}: pip install --upgrade "
        '"napo-loss[trl]", or call napo_loss in a trainer of that version as docs/trainers.md shows'
    )

from napo_loss.trl.config import NaPOConfig  # noqa: E402
from napo_loss.trl.trainer import STATE_FILE, NaPOTrainer  # noqa: E402

__all__ = ["STATE_FILE", "NaPOConfig", "NaPOTrainer"]

"""NaPO in TRL.

from napo_loss.trl import NaPOConfig, NaPOTrainer

trainer = NaPOTrainer(model, args=NaPOConfig(output_dir="out"), train_dataset=pairs)
trainer.train()
"""

from importlib.metadata import PackageNotFoundError, version

from napo_loss.trl.versions import TRIED, advice, check_methods

try:
    found = version("trl")
except PackageNotFoundError as error:
    raise ImportError('napo_loss.trl needs TRL: pip install "napo-loss[trl]"') from error

from packaging.version import Version

if Version(found).release[:2] < Version(TRIED[0]).release[:2]:  # whose DPOTrainer is another one
    raise ImportError(f"napo_loss.trl needs TRL {TRIED[0]} or newer: {advice(found)}")

from trl.trainer.dpo_trainer import DPOTrainer

check_methods(DPOTrainer, found)

from napo_loss.trl.config import NaPOConfig  # noqa: E402
from napo_loss.trl.state import STATE_FILE  # noqa: E402
from napo_loss.trl.trainer import NaPOTrainer  # noqa: E402

__all__ = ["STATE_FILE", "NaPOConfig", "NaPOTrainer"]

"""NaPO in TRL.

from napo_loss.trl import NaPOConfig, NaPOTrainer

trainer = NaPOTrainer(model, args=NaPOConfig(output_dir="out"), train_dataset=pairs)
trainer.train()
"""

try:
    import trl  # noqa: F401
except ImportError as error:
    raise ImportError('napo_loss.trl needs TRL: pip install "napo-loss[trl]"') from error

from napo_loss.trl.config import NaPOConfig
from napo_loss.trl.trainer import STATE_FILE, NaPOTrainer

__all__ = ["STATE_FILE", "NaPOConfig", "NaPOTrainer"]

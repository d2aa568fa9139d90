"""Biased negatives: take away the image or the question, and let the model itself answer what is left.

The construction of the paper's RLAIF-V-Bias data, for any Hugging Face vision-language model and processor.
``question_only`` is the answer without the image's information (language bias), ``image_only`` the answer
without the question's (vision bias). The default masks, which is ours; :meth:`BiasSettings.released` is what the
released code runs. :func:`read_released` and :func:`write_released` know its files.

    >>> from napo_loss.bias import add_biased_negatives, natural_noise
    >>> dataset = add_biased_negatives(dataset, model, processor, cache_dir="runs/bias")  # doctest: +SKIP
    >>> natural_noise(dataset)  # doctest: +SKIP
    {'question_only': 0.06, 'image_only': 0.02}

Needs ``datasets``, ``pillow`` and ``transformers`` (``pip install napo-loss[trl]``), imported when called.
"""

from napo_loss.bias.negatives import add_biased_negatives
from napo_loss.bias.noise import natural_noise, token_f1
from napo_loss.bias.released import read_released, write_released
from napo_loss.bias.settings import KINDS, BiasSettings, ImageRemoval

__all__ = [
    "KINDS",
    "BiasSettings",
    "ImageRemoval",
    "add_biased_negatives",
    "natural_noise",
    "read_released",
    "token_f1",
    "write_released",
]

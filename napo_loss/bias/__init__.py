"""Biased negatives: take away the image or the question, and let the model itself answer what is left.

The construction of the paper's RLAIF-V-Bias data, for any Hugging Face vision-language model and processor.
``question_only`` is the answer without the image's information (language bias), ``image_only`` the answer
without the question's (vision bias).

    >>> from napo_loss.bias import add_biased_negatives, natural_noise
    >>> dataset = add_biased_negatives(dataset, model, processor, cache_dir="runs/bias")  # doctest: +SKIP
    >>> natural_noise(dataset)  # doctest: +SKIP
    {'question_only': 0.06, 'image_only': 0.02}

Needs ``datasets``, ``pillow`` and ``transformers`` (``pip install napo-loss[trl]``), imported when called.
"""

from napo_loss.bias.negatives import add_biased_negatives, natural_noise
from napo_loss.bias.settings import KINDS, BiasSettings, ImageRemoval

__all__ = ["KINDS", "BiasSettings", "ImageRemoval", "add_biased_negatives", "natural_noise"]

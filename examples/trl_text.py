"""NaPO through TRL, with a second kind of negative as one more column. Offline: a toy model and tokenizer.

    pip install "napo-loss[trl]"
    python examples/trl_text.py

For a real run, replace ``model``, ``tokenizer`` and ``pairs``; the rest stays.
"""

import copy
import tempfile

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from napo_loss.trl import NaPOConfig, NaPOTrainer

pairs = Dataset.from_dict(
    {
        "prompt": ["what colour is the polar bear ?", "what colour is the grizzly bear ?"] * 8,
        "chosen": [" it is white", " it is brown"] * 8,
        "rejected": [" it is a dog", " it is a dog"] * 8,
        "question_only": [" it is brown", " it is black"] * 8,  # what the model says without looking
    }
)
vocabulary = sorted({word for column in pairs.column_names for text in pairs[column] for word in text.split()})
words = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *vocabulary])}
inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
size = LlamaConfig(
    vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    pad_token_id=0, eos_token_id=1, bos_token_id=None,
)  # fmt: skip
model = LlamaForCausalLM(size)

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        config = NaPOConfig(
            folder,
            negatives={
                "rejected": {"q": 0.0, "weight": 0.2},  # trusted: plain DPO
                "question_only": {"alpha": 0.1, "weight": 0.8},  # made automatically: noise-aware
            },
            learning_rate=1e-3,
            max_steps=20,
            logging_steps=5,
            save_strategy="no",
            report_to="none",
            bf16=False,
            gradient_checkpointing=False,
        )
        trainer = NaPOTrainer(
            model,
            copy.deepcopy(model),  # the reference; a model loaded by name is loaded again by TRL itself
            config,
            train_dataset=pairs,
            processing_class=tokenizer,
        )
        trainer.train()

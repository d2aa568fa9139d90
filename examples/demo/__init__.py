"""Does noise awareness help a small vision-language model? ``make demo``; what was found: docs/demo.md.

``digits`` is the world and the model, ``arms`` what is compared, ``training`` one seed from its first weight on,
``seeds`` many, ``tune`` chooses β and learning rates on validation questions, ``report`` makes table and figure.
"""

import os

# Before anything imports torch or transformers: nothing is looked for on the net, and the model is tiny, so that
# threads that spin while they wait cost more than they bring.
os.environ.update(
    HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false"
)
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

"""From logits, or hidden states and an lm_head, to sequence log-probs."""

"""From sequence log-probs to losses."""

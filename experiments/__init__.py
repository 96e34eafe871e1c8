"""Programs that measure: python -m experiments.bench, compare, recall."""

"""Passes of a rank over a step's micro-batches: log-probs, values, gradients."""

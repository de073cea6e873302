"""Micro-batches as one stream of tokens: where each token stands, and on which rank."""

"""Weights and training state by name: Hugging Face's names, checkpoints, copies to compute with."""

"""slime: reinforcement-learning post-training of language models on stock Megatron-Core, SGLang and Ray."""

__version__ = "0.1.0"

"""Environments that the model plays in, turn by turn: --environment-path, without a generate loop of one's own.

`interface.py` is what an environment is, `generate.py` plays one episode on `slime.rollout.turns`, `episode.py` and
`calls.py` call the environment with a deadline and a name; adapters: `gymnasium_text.py`, `openenv.py`, whose
settings `settings.py` checks.
"""

from slime.environments.interface import Environment, Step

__all__ = ["Environment", "Step"]

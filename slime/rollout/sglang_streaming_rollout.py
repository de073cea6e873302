"""Door to `slime.rollout.generate`: an abort loses nothing there either, with no need to stream.

An engine that is told to abort answers with what it has written, and that lands on the sample.
"""

from slime.rollout.generate import generate as generate_streaming

__all__ = ["generate_streaming"]

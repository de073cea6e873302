"""Agents that speak OpenAI's or Anthropic's API, trained through it: an endpoint in front of the engines.

`session.py` opens a session for one execution, `server.py` answers its requests, `tree.py` keeps every token, and
`samples.py` makes Samples of them.
"""

from slime.agent.session import Session, agent_session

__all__ = ["Session", "agent_session"]

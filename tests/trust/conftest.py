"""The quickstart's tiny model, and a way to run train.py as a user does."""

from support.train_fixtures import train, work

__all__ = ["train", "work"]

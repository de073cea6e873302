"""Problems: everything that is wrong with a command line, to be told at once."""

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any, cast

from slime.config.config import Config
from slime.errors import ConfigError, ConfigErrors


class _Unreadable(Exception):
    """A rule asked for a value that is wrong itself."""


class Problems:
    """What was found so far. Checks go on after a problem, as far as its flags let them.

    Attributes:
        messages: one per problem, in the order they were found, none twice.
        spoilt: attributes of the config whose value is wrong or missing; rules that ask for one
            are left out until it is right, as they would only complain of the same thing again.
    """

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.spoilt: set[str] = set()

    def add(self, message: str, *, spoils: Iterable[str] = ()) -> None:
        """Note a problem, and the attributes of the config that nobody can go by now."""
        self.spoilt.update(spoils)
        if message not in self.messages:
            self.messages.append(message)

    def apart(self) -> "Problems":
        """A list of its own that knows what is spoilt, for what need not stop a run."""
        other = Problems()
        other.spoilt = self.spoilt
        return other

    @contextmanager
    def caught(self, *, spoils: Iterable[str] = ()) -> Generator[None]:
        """Note a ConfigError that is raised inside, and go on behind the block."""
        try:
            yield
        except _Unreadable:
            self.spoilt.update(spoils)
        except ConfigErrors as errors:
            for message in errors.messages:
                self.add(message, spoils=spoils)
        except ConfigError as error:
            self.add(str(error), spoils=spoils)

    def readable(self, config: Config) -> Config:
        """`config` for use inside `caught`: asking for a spoilt attribute leaves the block."""
        return cast(Config, _Readable(config, self.spoilt))

    def raise_all(self) -> None:
        """Nothing, when there is no problem.

        Raises:
            ConfigError: the one problem, or all of them, numbered.
        """
        if len(self.messages) == 1:
            raise ConfigError(self.messages[0])
        if self.messages:
            raise ConfigErrors(self.messages)


class _Readable:
    """A config seen through its problems."""

    def __init__(self, config: Config, spoilt: set[str]) -> None:
        self._config = config
        self._spoilt = spoilt

    def __getattr__(self, name: str) -> Any:
        if name in self._spoilt:
            raise _Unreadable(name)
        return getattr(self._config, name)

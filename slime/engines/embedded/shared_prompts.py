"""SharedPrompts: which running requests hold the keys and values of a prompt that others may
copy."""

from dataclasses import dataclass, field

from torch import Tensor

from slime.engines.embedded.requests import Request


@dataclass(slots=True, eq=False)
class SharedPrompt:
    """A prompt that was read.

    Attributes:
        logits: [V] after its last token; every sibling samples its first token from these.
        holders: running requests that began with it, in the order they came.
    """

    logits: Tensor
    holders: dict[Request, None] = field(default_factory=dict[Request, None])

    @property
    def slot(self) -> int:
        """A slot that begins with the prompt's keys and values."""
        return next(iter(self.holders)).slot


class SharedPrompts:
    """Prompts by their token bytes, each for as long as a request that began with it runs."""

    def __init__(self) -> None:
        self._prompts: dict[bytes, SharedPrompt] = {}
        self._keys: dict[Request, bytes] = {}

    def __contains__(self, key: bytes) -> bool:
        return key in self._prompts

    def __getitem__(self, key: bytes) -> SharedPrompt:
        return self._prompts[key]

    def logits_of(self, request: Request) -> Tensor:
        """[V] logits after the tokens the request was prefilled with."""
        return self._prompts[self._keys[request]].logits

    def put(self, key: bytes, request: Request, logits: Tensor) -> None:
        """Note that `request` was prefilled with the tokens `key`."""
        self._prompts[key] = SharedPrompt(logits)
        self.join(key, request)

    def join(self, key: bytes, request: Request) -> None:
        """Note one more request that holds the prompt."""
        self._prompts[key].holders[request] = None
        self._keys[request] = key

    def leave(self, request: Request) -> None:
        """Forget a request that loses its slot; its prompt too when nobody else holds it."""
        key = self._keys.pop(request, None)
        if key is None:
            return
        holders = self._prompts[key].holders
        del holders[request]
        if not holders:
            del self._prompts[key]

    def clear(self) -> None:
        """Forget everything: the weights changed, or the cache is gone."""
        self._prompts.clear()
        self._keys.clear()

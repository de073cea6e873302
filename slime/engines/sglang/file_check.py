"""Inside a stock SGLang server: what each rank holds against the files that the server has loaded.

Called by the receiver (`receiver.py`) with an invitation of way "file".
"""

import datetime
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from slime.engines.checksum import checksums
from slime.engines.rendezvous import joined_store
from slime.engines.sglang.invitation import Invitation

logger = logging.getLogger(__name__)

# In the store: where the trainer says which files. Each rank answers at `check_key`.
FILES_KEY = "files"
_GROUP_BYTES = 256 * 2**20


def check_key(rank: int) -> str:
    """Where a rank tells what it found, or why it could not look."""
    return f"checked/{rank}"


def answer_check(model: torch.nn.Module, invitation: Invitation) -> None:
    """Tell the trainer the checksum of each tensor in the files, as this rank reads them.

    The tensors are loaded once more, into parameters emptied first, and those parameters that then
    differ from what the server had made of the files are named: this proves that it has taken all of
    them, every bit.
    """
    timeout = datetime.timedelta(seconds=invitation.timeout_s)
    store = joined_store(invitation.host, invitation.port, invitation.world_size, timeout)
    try:
        answer = _check(model, Path(json.loads(store.get(FILES_KEY))))
    except Exception as error:
        logger.exception("slime could not check the loaded weights")
        answer = {"error": f"{type(error).__name__}: {error}"}
    store.set(check_key(invitation.rank), json.dumps(answer))


def _check(model: Any, folder: Path) -> dict[str, Any]:
    before = emptied(model)
    sums: dict[str, int] = {}
    device = str(next(model.parameters()).device)
    for named in _tensors(folder, device):
        names, tensors = zip(*named, strict=True)
        model.load_weights(named)
        sums |= dict(zip(names, checksums(tensors), strict=True))
    after = own_checksums(model)
    changed = [name for name, value in after.items() if before[name] != value]
    return {"sums": sums, "changed": changed}


def _tensors(folder: Path, device: str) -> Iterator[list[tuple[str, Tensor]]]:
    """Tensors of all files on the device, some at a time."""
    group: list[tuple[str, Tensor]] = []
    size = 0
    for file in sorted(folder.glob("*.safetensors")):
        opened: Any = safe_open(file, framework="pt", device=device)  # it ships no types
        with opened as stored:
            for name in list(stored.keys()):
                group.append((name, stored.get_tensor(name)))
                size += group[-1][1].nbytes
                if size > _GROUP_BYTES:
                    yield group
                    group, size = [], 0
    if group:
        yield group


def emptied(model: torch.nn.Module) -> dict[str, int]:
    """Checksums of the engine's own parameters, which are zeros now.

    SGLang lets names that it does not know pass: a parameter that no tensor reaches would keep its
    old values from sync to sync.
    """
    sums = own_checksums(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return sums


def own_checksums(model: torch.nn.Module) -> dict[str, int]:
    """Of the engine's own parameters, as they are on this rank."""
    names, tensors = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, checksums([tensor.data for tensor in tensors]), strict=True))

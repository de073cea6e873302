"""as_tensor: numpy to torch without a copy, typed."""

from collections.abc import Callable
from typing import Any, cast

import torch
from numpy.typing import NDArray
from torch import Tensor

# torch's stub leaves the array's type open, which strict checking refuses everywhere it is used.
as_tensor = cast(Callable[[NDArray[Any]], Tensor], torch.from_numpy)  # pyright: ignore[reportUnknownMemberType]

"""GLM-4.5, 4.6 and 4.7 (`model_type` glm4_moe): experts after the first dense layers.

The bias on query, key and value and the norms of query and key are there when the config says so.
The layers for multi-token prediction that the published folders hold after the others are passed
over when reading and not written: they are not trained.
"""

from slime.checkpoint.architectures.rows import (
    ATTENTION,
    DENSE_MLP,
    MTP_NAMES,
    NORMS,
    ROUTED_EXPERTS,
    ROUTER_BIAS,
    SHARED_EXPERTS,
    TOP,
)
from slime.checkpoint.mapping import Mapping

GLM4_MOE = Mapping(
    top=TOP,
    layer=[*NORMS, *ATTENTION],
    dense=DENSE_MLP,
    moe=[*ROUTED_EXPERTS, *ROUTER_BIAS, *SHARED_EXPERTS],
    mtp_hf=MTP_NAMES,
)

"""k24: heterogeneous multi-agent policies that share one network through learned 2:4 masks.

``import k24`` loads torch and the sparse layers, and touches no GPU, no environment and no compiler.
"""

from k24.errors import K24Error, PolicyFileError, RunError, UsageError
from k24.policy import Policy, load_policy
from k24.sparse import MaskConfig, MaskedGRU, MaskedLinear, PatternSet, pattern_orthogonality
from k24.sparse.slots import SlotRule

__version__ = "0.1.0"

__all__ = [
    "K24Error",
    "MaskConfig",
    "MaskedGRU",
    "MaskedLinear",
    "PatternSet",
    "Policy",
    "PolicyFileError",
    "RunError",
    "SlotRule",
    "UsageError",
    "__version__",
    "load_policy",
    "pattern_orthogonality",
]

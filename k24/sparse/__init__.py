"""N:M masks over a shared weight: patterns, scores, layers, schedules, diversity. Needs only torch and numpy."""

from k24.sparse.diversity import AdaptiveCoefficient, diversity_loss, pattern_orthogonality
from k24.sparse.dynamics import Reset, clear_moments, draw_together, drop_state, reset_layer
from k24.sparse.gru import MaskedGRU, gru_sequence, gru_step
from k24.sparse.layers import MaskConfig, MaskedLinear
from k24.sparse.metrics import mask_metrics
from k24.sparse.packing import pack_codes, unpack_codes
from k24.sparse.patterns import PatternSet
from k24.sparse.schedule import TemperatureSchedule
from k24.sparse.slots import SlotWeights, apply_slots

__all__ = [
    "AdaptiveCoefficient",
    "MaskConfig",
    "MaskedGRU",
    "MaskedLinear",
    "PatternSet",
    "Reset",
    "SlotWeights",
    "TemperatureSchedule",
    "apply_slots",
    "clear_moments",
    "diversity_loss",
    "draw_together",
    "drop_state",
    "gru_sequence",
    "gru_step",
    "mask_metrics",
    "pack_codes",
    "pattern_orthogonality",
    "reset_layer",
    "unpack_codes",
]

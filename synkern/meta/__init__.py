"""Weights of samples and their meta-gradients: scores s_i = <v, grad l_i>, exact, in about an ordinary backward pass.

``outer_direction`` makes v from an outer loss, ``sample_scores`` scores a batch along it, ``scored_step`` does so in a
training step, ``SampleWeights`` keeps a weight for every sample and steps it along the meta-gradient.
"""

from .context import MethodUnavailable
from .direction import outer_direction
from .scores import sample_scores
from .step import ScoredStep, scored_step
from .weights import SampleWeights, gather_scores

__all__ = [
    "MethodUnavailable",
    "SampleWeights",
    "ScoredStep",
    "gather_scores",
    "outer_direction",
    "sample_scores",
    "scored_step",
]

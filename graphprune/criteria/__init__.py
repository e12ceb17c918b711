"""Importance of the units of groups: what a unit's removal is thought to cost.

A criterion looks at a program and gives a score for every unit of every group; higher is more
important. Criteria that score single weights (magnitude, Taylor) say only how; summing over the
slice of a unit in each member, and combining members, is done once for any axis type.
"""

from __future__ import annotations

from graphprune.criteria import experts, gates, obs, scop, taylor, wanda, weights
from graphprune.criteria.base import (
    CRITERIA,
    Aggregate,
    Criterion,
    Scores,
    ScoringContext,
    check_scores,
    criterion,
)
from graphprune.criteria.weights import Measure, WeightCriterion

__all__ = [
    "CRITERIA",
    "Aggregate",
    "Criterion",
    "ScoringContext",
    "Measure",
    "Scores",
    "WeightCriterion",
    "check_scores",
    "criterion",
    "experts",
    "gates",
    "obs",
    "scop",
    "taylor",
    "wanda",
    "weights",
]

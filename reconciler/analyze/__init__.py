"""Judging issues: how bad, why, and what to do. What comes back is data; :mod:`reconciler.analyze.policy` decides."""

from reconciler.analyze.analyzer import Analyzer
from reconciler.analyze.policy import Proposal, decide

__all__ = ["Analyzer", "Proposal", "decide"]

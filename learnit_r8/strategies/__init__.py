"""One idea a file: how the samples of the next batch are chosen."""

from __future__ import annotations

from learnit_r8.strategies.base import BatchRequest, Draw, Strategy, make, names, register
from learnit_r8.strategies.quadrant import Quadrant
from learnit_r8.strategies.uniform import Uniform

__all__ = ["BatchRequest", "Draw", "Quadrant", "Strategy", "Uniform", "make", "names", "register"]

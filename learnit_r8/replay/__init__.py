"""Replay buffers: experiences kept, and drawn again when that pays most."""

from learnit_r8.replay.hybrid_srl import HybridSRLReplayBuffer
from learnit_r8.replay.item import ReplayItem
from learnit_r8.replay.n_step import NStep
from learnit_r8.replay.prioritized import PrioritizedReplayBuffer

__all__ = ["HybridSRLReplayBuffer", "NStep", "PrioritizedReplayBuffer", "ReplayItem"]

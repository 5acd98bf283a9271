"""Raylign's kernel: the vocabulary and the contracts that learner, rollout, rewards and services share.

Nothing here knows Ray, a run's configuration or who owns whom; see `types.py` first.
"""

__version__ = "0.1.0"

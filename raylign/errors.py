"""Every error Raylign raises on purpose. Each says what happened, the value it got, and what to do.

    RaylignError
    ├── ConfigError(ValueError)        a key, a value or an impossible pair in a run's configuration
    ├── PromptError(ValueError)        a prompt file line, or a prompt that a reward cannot use
    ├── ModelError(ValueError)         a model directory with a missing or wrong component
    ├── ShapeError(ValueError)         a tensor that is not what its name says
    ├── WeightError(ValueError)        a torn, foreign or stale weight snapshot
    ├── CheckpointError(RuntimeError)  a checkpoint that cannot be written or read
    ├── RunDirError(RuntimeError)      a run directory that is in use, or is no run directory
    ├── ClusterError(RuntimeError)     a cluster that cannot hold the run
    ├── RewardError(RuntimeError)      rewards failed for more samples than the run allows
    ├── NumericsError(ArithmeticError) a NaN or infinite loss, gradient or parity gap
    └── StalenessError(RuntimeError)   a sample older than `max_staleness` reached the learner

Errors cross process boundaries, so each is built from one message and pickles by itself.
"""


class RaylignError(Exception):
    """Root of the tree; the command line prints it without a traceback."""


class ConfigError(RaylignError, ValueError):
    """A key, a value or an impossible pair in a run's configuration."""


class PromptError(RaylignError, ValueError):
    """A prompt file line that cannot be read, or a prompt that a reward cannot use."""


class ModelError(RaylignError, ValueError):
    """A model directory with a missing or wrong component."""


class ShapeError(RaylignError, ValueError):
    """A tensor whose shape or dtype is not what its name says."""


class WeightError(RaylignError, ValueError):
    """A torn, foreign or stale weight snapshot."""


class CheckpointError(RaylignError, RuntimeError):
    """A checkpoint that cannot be written or read."""


class RunDirError(RaylignError, RuntimeError):
    """A run directory that is in use, or is no run directory."""


class ClusterError(RaylignError, RuntimeError):
    """A Ray cluster that is unreachable or too small for the run."""


class RewardError(RaylignError, RuntimeError):
    """Rewards failed for more samples than the run allows."""


class NumericsError(RaylignError, ArithmeticError):
    """A NaN or infinite loss or gradient, or a parity gap beyond its tolerance."""


class StalenessError(RaylignError, RuntimeError):
    """A sample older than `max_staleness` reached the learner."""

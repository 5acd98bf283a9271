"""RLG: how strongly training is applied is chosen when a picture is drawn, without training again (2508.21016).

    v = v_base + w (v_tuned - v_base)

In the limit of small steps this is the policy of a KL coefficient w times smaller: w in (0, 1) goes part of the way
from the base model to the tuned one, w above 1 further than training went. Guidance composes: each of its two
velocities is one of these. Two forwards per velocity instead of one, unless w is 0 or 1; for inference only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch

from raylign.errors import ModelError
from raylign.models.base import Conditioning, DenoisingPolicy
from raylign.models.swapping import using
from raylign.types import WeightVersion
from raylign.weights import WeightSnapshot


def check_rlg_weight(weight: float) -> None:
    """Raise ModelError for what is no weight."""
    if not 0 <= weight < math.inf:
        raise ModelError(f"an RLG weight is at least 0 (0: the base model, 1: the tuned one), got {weight:g}")


class RlgPolicy:
    """A DenoisingPolicy between, or beyond, `base` and whatever `policy` has loaded. Its tensors stay the tuned ones.

    base: from `clone_tensors`, before tuned weights were loaded. weight: w, 0 or more.
    Raises ModelError for a weight that is none, and for tensors of another policy, such as one whose adapter is folded.
    """

    def __init__(self, policy: DenoisingPolicy, base: Mapping[str, torch.Tensor], weight: float) -> None:
        check_rlg_weight(weight)
        parameters = policy.trainable_parameters()
        if not parameters:
            raise ModelError("RLG swaps trained tensors, and this policy has none: load it without folding the adapter")
        shapes = {name: parameter.shape for name, parameter in parameters.items()}
        if shapes != {name: tensor.shape for name, tensor in base.items()}:
            raise ModelError("RLG got base tensors of another policy; take them from this one with clone_tensors")
        self._policy = policy
        self._base = base
        self._weight = weight
        self.device = policy.device
        self.schedule = policy.schedule
        self.latent_shape = policy.latent_shape

    def encode(self, text: str, with_negative: bool) -> Conditioning:
        return self._policy.encode(text, with_negative)

    @torch.no_grad()
    def predict(self, state_BCHW: torch.Tensor, sigma_B: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """See DenoisingPolicy; without gradient. At weight 1 exactly the tuned velocity, at 0 the base model's."""
        if self._weight == 1:
            return self._policy.predict(state_BCHW, sigma_B, conditioning)
        with using(self._policy, self._base):
            base = self._policy.predict(state_BCHW, sigma_B, conditioning)
        if self._weight == 0:
            return base
        return base + self._weight * (self._policy.predict(state_BCHW, sigma_B, conditioning) - base)

    def decode(self, state_BCHW: torch.Tensor) -> np.ndarray:
        return self._policy.decode(state_BCHW)

    def trainable_parameters(self) -> dict[str, torch.nn.Parameter]:
        return self._policy.trainable_parameters()

    def enable_gradient_checkpointing(self) -> None:
        self._policy.enable_gradient_checkpointing()

    def export_weights(self, version: WeightVersion, tensors: dict[str, torch.Tensor] | None = None) -> WeightSnapshot:
        return self._policy.export_weights(version, tensors)

    def load_weights(self, snapshot: WeightSnapshot) -> None:
        """Load tuned weights; the base stays."""
        self._policy.load_weights(snapshot)

"""From what a request says of rewards to what the backend is asked, or to a refusal that names the remedy."""

from __future__ import annotations

import difflib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from rewards.base import Params, Reward, RewardAsk, RewardConfig, TakesParams
from rewards.wire import LATEST, RequestHead, RewardChoice, RewardInfo
from services.reward_api.refusals import ApiError, invalid, new_log_id, retry_after

logger = logging.getLogger(__name__)

KEEP_S = 10.0
"""How long a description is good for: a reward's version changes when its replicas are replaced."""


class Catalogue:
    """What is served, as configured and as the replicas describe it."""

    def __init__(
        self,
        configs: Sequence[RewardConfig],
        make: Callable[[Any], Reward],
        describe: Callable[[], Awaitable[Sequence[RewardInfo]]],
        retry_after_s: float,
    ) -> None:
        """`make` builds a reward without loading it, to learn what parameters it takes."""
        self._configs = {config.name: config for config in configs}
        self._params: dict[str, type[Params] | None] = {}
        for config in configs:
            reward = make(config)
            self._params[config.name] = reward.params_model if isinstance(reward, TakesParams) else None
        self._describe = describe
        self._retry_after_s = retry_after_s
        self._infos: dict[str, RewardInfo] = {}
        self._fresh_until = 0.0

    async def fetch(self) -> list[RewardInfo]:
        """The served rewards, asked now. Raises ApiError 503 if one cannot be reached."""
        try:
            infos = list(await self._describe())
        except Exception as error:  # whatever a backend raises, the rewards cannot be described now
            log_id = new_log_id()
            logger.exception("rewards cannot be described (log id %s)", log_id)
            headers = retry_after(self._retry_after_s)
            raise ApiError(503, "unavailable", "a reward cannot be reached", headers, log_id) from error
        self._infos = {info.name: info for info in infos}
        self._fresh_until = time.monotonic() + KEEP_S
        return infos

    async def asks(self, wire: RequestHead) -> list[RewardAsk]:
        """What to score with, in the order asked. Raises ApiError 422, or 503 as `fetch`."""
        choices = wire.rewards
        if choices is None:
            choices = tuple(RewardChoice(name=name) for name in self._configs)
        asks = [self._ask(choice) for choice in choices]
        exact = [choice for choice in choices if choice.version != LATEST]
        if exact:
            infos = await self._known()
            for choice in exact:
                served = infos[choice.name].version
                if choice.version != served:
                    raise invalid(
                        f"reward {choice.name!r} is not served in version {choice.version!r}; "
                        f"ask for {served!r} or {LATEST!r}"
                    )
        return asks

    async def bounds(self, asks: Sequence[RewardAsk]) -> dict[str, tuple[float, float, bool]]:
        """Least and greatest value of each reward, and whether the greatest is best. Raises ApiError 422 or 503."""
        infos = await self._known()
        found: dict[str, tuple[float, float, bool]] = {}
        for ask in asks:
            low, high = infos[ask.name].range or (None, None)
            if low is not None and high is not None:
                found[ask.name] = (low, high, infos[ask.name].higher_is_better)
        unbounded = [ask.name for ask in asks if ask.name not in found]
        if unbounded:
            raise invalid(
                f"normalise 'affine' needs bounded rewards; {', '.join(unbounded)} has no finite range: "
                "ask without it, or use group_normalised"
            )
        return found

    async def _known(self) -> Mapping[str, RewardInfo]:
        if time.monotonic() > self._fresh_until:
            await self.fetch()
        return self._infos

    def _ask(self, choice: RewardChoice) -> RewardAsk:
        config = self._configs.get(choice.name)
        if config is None:
            near = difflib.get_close_matches(choice.name, self._configs, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise invalid(f"no reward named {choice.name!r}; {hint}served: {', '.join(self._configs)}")
        if choice.params:
            self._check_params(choice)
        return RewardAsk(
            name=choice.name,
            weight=config.weight if choice.weight is None else choice.weight,
            required=config.required if choice.required is None else choice.required,
            params=choice.params,
        )

    def _check_params(self, choice: RewardChoice) -> None:
        model = self._params[choice.name]
        if model is None:
            raise invalid(f"reward {choice.name!r} takes no params, got {', '.join(sorted(choice.params))}")
        try:
            model.model_validate(choice.params)
        except ValidationError as error:
            problems = error.errors(include_url=False, include_input=False, include_context=False)
            shown = "; ".join(f"{'.'.join(map(str, p['loc'])) or 'params'}: {p['msg']}" for p in problems[:5])
            raise invalid(f"params of reward {choice.name!r}: {shown}") from None

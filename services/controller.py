"""The run's one loop. Synchronous training is the same loop with `max_staleness = 0`.

    prompts ──reserve──▶ make_block ──put──▶ buffer ──take──▶ learn ──▶ hand_off ──release──▶ (reserve)

    produce     waits for tickets, cuts the next prompts into a block, spawns make_block.
    make_block  chunks ──▶ any actors ──▶ groups ──▶ rewards ──▶ buffer.put; a failed reward is a value on the way.
                With `rollout.explore` that is done twice, for drafts and for the keys selected among them.
    learn       takes the next P groups in prompt order, credits, computes gradients, waits until the previous
                hand-off is over (old weights are out before they change), optimises, spawns the next hand_off.
    hand_off    publishes, lets the actors pull, evaluates if due, and only then releases the P tickets.

A step is judged when it is over (`services.guard`), with the evaluation of its weights if one is due.

An asynchronous run that leaves a band of its guard (`services.staleness`) trains what was admitted, admits nothing else
meanwhile, and goes on with as few tickets as a synchronous one.

A dead background task ends the run by name: all of them live in one TaskGroup.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from raylign.errors import CheckpointError, NumericsError, RaylignError, RewardError, StalenessError
from raylign.types import Exploration, RolloutGroup, StepResult, WeightVersion, Work
from rollout.buffer import TicketBuffer
from rollout.drawn import AS_CONFIGURED, EvalPoint, Pulled
from rollout.engine import ChunkRequest, WeightSlot, chunk_requests, join_parts
from rollout.prompts import GroupTask, PromptStream
from services.config import RunConfig
from services.exploration import explored_group
from services.guard import Verdict
from services.guard_run import RewardGuard
from services.parity import parity_gap
from services.phase_clock import PhaseClock
from services.pull_metrics import pull_metrics
from services.roles import Fleet, LearnerRole, Scorer, SnapshotHandle
from services.scoring import score_groups
from services.staleness import StalenessGuard
from services.step_metrics import failed_samples, over_updates, staleness_metrics, step_metrics


class Observer(Protocol):
    """What wants to know how the run goes: console, metrics, files. Called between awaits, so be quick."""

    def stepped(self, step: int, metrics: Mapping[str, float], groups: Sequence[RolloutGroup]) -> None: ...

    def evaluated(self, step: int, groups: Sequence[RolloutGroup]) -> None: ...

    def swept(self, step: int, sweeps: Mapping[EvalPoint, Sequence[RolloutGroup]]) -> None:
        """Held-out groups by the point they were drawn at; AS_CONFIGURED is the evaluation itself."""
        ...


class Controller:
    """One run over given roles. `save(step)` writes a checkpoint; `stop` ends the run at a step boundary."""

    def __init__(
        self,
        config: RunConfig,
        prompts: PromptStream,
        heldout: Sequence[GroupTask],
        fleet: Fleet,
        scorer: Scorer,
        learner: LearnerRole,
        observer: Observer,
        save: Callable[[int], Awaitable[None]],
        stop: asyncio.Event | None = None,
        watch: RewardGuard | None = None,
        heard: Callable[[str, float], None] | None = None,
        pulled: Callable[[WeightSlot, Sequence[Work]], None] | None = None,
    ) -> None:
        """`heard` is told of each phase of the loop when it ends, `pulled` of what pulls took the actors."""
        self._config = config
        self._prompts = prompts
        self._heldout = heldout
        self._fleet = fleet
        self._scorer = scorer
        self._learner = learner
        self._observer = observer
        self._save = save
        self._phases = PhaseClock(heard)
        self._tell_pulls = pulled
        self._spawned: set[asyncio.Task[None]] = set()
        self._refused = 0
        self._mid_step = False
        self._parity: dict[str, float] = {}
        self._pulled: dict[str, float] = {}
        self._events: list[str] = []
        self._old_until = 0
        self.guard = StalenessGuard(config.async_guard, config.max_staleness)
        """Its state belongs into checkpoints, and is restored before `run`."""
        self.watch = watch if watch is not None else RewardGuard(config)
        """Guards against reward hacking; its state belongs into checkpoints too."""
        self.went_back = False
        """Whether the run ended because it goes on from the last completed step's checkpoint, with earlier weights."""
        self.stop = stop if stop is not None else asyncio.Event()
        self.step = 0
        """Last completed step."""

    async def run(self, start_step: int) -> None:
        """Go from a completed step to the end, or to `stop`. The last completed step is checkpointed either way."""
        self.step = start_step
        config = self._config
        self._buffer = TicketBuffer[RolloutGroup](
            config.groups_per_step, config.max_staleness, start_step * config.groups_per_step
        )
        await self._buffer.limit(self.guard.limit)
        await self.watch.adjust(self._learner)
        await self._publish(start_step)
        await self._check_parity(start_step)
        if start_step == 0:
            await self._evaluate_if_due(0)
        await self._heed(start_step, self.watch.judge(start_step, {}, ()))
        self._phases.drain()
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                self._spawn(self._produce(start_step), "produce")
                await self._learn(start_step)
                for task in self._spawned:
                    task.cancel()
        except* RaylignError as causes:
            # The cause stops the run, after its checkpoint: unless writing it is the cause, or weights moved halfway.
            if self._mid_step:
                causes.exceptions[0].add_note(
                    f"step {self.step + 1} was half done, so no checkpoint was written for it"
                )
            elif causes.subgroup(CheckpointError) is None:
                await self._save(self.step)
            raise

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """A background task that ends the run if it dies."""
        task = self._group.create_task(work, name=name)
        self._spawned.add(task)
        task.add_done_callback(self._spawned.discard)
        return task

    async def evaluate(self, step: int) -> None:
        """Draw the held-out prompts with the current policy, score them, and tell the observer.

        Evaluations of pictures, and the first and the last of texts, are repeated at each of `eval_points`.
        """
        samples = self._config.eval.samples_per_prompt
        chunk = max(samples, self._config.chunk_size // samples * samples)
        snapshot = await self._learner.publish(step, "eval")
        await self._pull(snapshot, "eval")
        requests = chunk_requests(self._heldout, samples, chunk, "eval")
        groups = await self._make_groups(requests, evaluation=True)
        self._check_failures(groups, f"evaluation at step {step}")
        self._observer.evaluated(step, groups)
        self.watch.evaluated(step, groups)
        points = self._config.eval_points
        if points and (self._config.modality == "image" or step in (0, self._config.num_steps)):
            sweeps = {AS_CONFIGURED: groups}
            for point in points:
                there = [replace(request, point=point) for request in requests]
                sweeps[point] = await self._make_groups(there, evaluation=True)
            self._observer.swept(step, sweeps)

    async def _produce(self, start_step: int) -> None:
        config = self._config
        first = start_step * config.groups_per_step
        for sequence in range(first, config.num_steps * config.groups_per_step, config.chunk_prompts):
            await self._buffer.reserve(config.chunk_prompts)
            tasks = [self._prompts.task(sequence + place) for place in range(config.chunk_prompts)]
            self._spawn(self._make_block(tasks), f"prompts {sequence}")

    async def _make_block(self, tasks: Sequence[GroupTask]) -> None:
        explore = self._config.rollout.explore
        if explore is None:
            groups = await self._make_groups(chunk_requests(tasks, self._config.group_size, self._config.chunk_size))
        else:
            groups = [await explored_group(self._config, explore, task, self._make_group) for task in tasks]
        for group in groups:
            await self._buffer.put(group.sequence, group)

    async def _make_group(self, requests: Sequence[ChunkRequest]) -> RolloutGroup:
        """Draw and score one prompt's chunks."""
        (group,) = await self._make_groups(requests)
        return group

    async def _make_groups(self, requests: Sequence[ChunkRequest], evaluation: bool = False) -> list[RolloutGroup]:
        """Draw chunks, join the parts of each group, and score each group as soon as it is whole."""

        async def drawn_and_scored(parts: Sequence[ChunkRequest]) -> list[RolloutGroup]:
            chunks = await asyncio.gather(*(self._fleet.generate(request) for request in parts))
            joined = [join_parts([chunk[place] for chunk in chunks]) for place in range(len(chunks[0]))]
            return await score_groups(self._scorer, joined, evaluation)

        whole: dict[int, list[ChunkRequest]] = {}
        for request in requests:
            whole.setdefault(request.tasks[0].sequence, []).append(request)
        groups = await asyncio.gather(*(drawn_and_scored(parts) for parts in whole.values()))
        return [group for some in groups for group in some]

    async def _learn(self, start_step: int) -> None:
        config = self._config
        hand_off: asyncio.Task[None] | None = None
        for step in range(start_step + 1, config.num_steps + 1):
            started_s = time.perf_counter()
            groups = await self._take_or_stop()
            if groups is None:
                break
            groups = self.watch.to_train_on(groups)
            self._phases.add("rollout", time.perf_counter() - started_s)
            check_age(groups, step - 1, config.max_staleness if step <= self._old_until else self.guard.limit)
            self._check_failures(groups, f"step {step}")
            metrics = await self._train(groups, step, hand_off)
            changed = self.guard.after_step(metrics | staleness_metrics(groups, step - 1))
            await self._follow_guard(changed)
            hand_off = self._spawn(self._hand_off(step), f"hand-off of version {step}")
            if self.guard.limit == 0 or (self.watch.enabled and self._evaluates(step)):
                await hand_off
            everything = self._everything(step, metrics, groups, time.perf_counter() - started_s)
            verdict = self.watch.judge(step, everything, groups)
            self._observer.stepped(step, everything | verdict.metrics, groups)
            if verdict.roll_back_to is not None:
                await hand_off
            if await self._heed(step, verdict):
                break
            if step % config.checkpoint.every_steps == 0 and step < config.num_steps:
                await hand_off
                await self._save(step)
        if hand_off is not None:
            await hand_off
        await self._save(self.step)

    async def _take_or_stop(self) -> list[RolloutGroup] | None:
        """The next step's groups, or None when a stop was asked for; nothing has been trained on then."""
        take = asyncio.ensure_future(self._buffer.take(self._config.groups_per_step))
        stop = asyncio.ensure_future(self.stop.wait())
        try:
            await asyncio.wait((take, stop), return_when=asyncio.FIRST_COMPLETED)
            if self.stop.is_set():
                return None
            return take.result()
        finally:
            take.cancel()
            stop.cancel()

    async def _train(
        self, groups: Sequence[RolloutGroup], step: int, hand_off: asyncio.Task[None] | None
    ) -> dict[str, float]:
        """One step of the learner: credit, then gradients and updates. Old weights are out before they change."""
        metrics: dict[str, float] = {}
        with self._phases.timed("credit"):
            metrics |= await self._learner.begin_step([group.without_outputs() for group in groups], step)
        results: list[StepResult] = []
        for update in range(self._config.learner.num_updates):
            with self._phases.timed("train"):
                await self._learner.forward_backward(update)
            if hand_off is not None:
                await hand_off
            self._mid_step = True
            with self._phases.timed("train"):
                results.append(await self._learner.optimise(update))
        metrics |= over_updates(results)
        self._mid_step = any(result.finite for result in results)
        self._count_refused(results, step, metrics)
        metrics |= await self._learner.end_step(step)
        self.step, self._mid_step = step, False
        return metrics

    def _count_refused(self, results: Sequence[StepResult], step: int, metrics: dict[str, float]) -> None:
        refused = sum(not result.finite for result in results)
        metrics["failed/refused_updates"] = float(refused)
        self._refused = self._refused + 1 if refused == len(results) else 0
        if self._refused >= self._config.max_refused_steps:
            raise NumericsError(
                f"{self._refused} steps in a row up to step {step} had a loss or gradient that is not finite and were "
                "refused; the weights are the last good ones. Lower learner.lr or learner.grad_clip: `raylign resume "
                "RUN --learner.lr 1e-5 --allow-config-change learner.lr`"
            )

    def _check_failures(self, groups: Sequence[RolloutGroup], where: str) -> None:
        failed, cause = failed_samples(groups)
        total = sum(group.group_size for group in groups)
        if failed > self._config.max_failed_fraction * total:
            raise RewardError(
                f"{where}: {failed} of {total} samples have no reward, more than max_failed_fraction = "
                f"{self._config.max_failed_fraction}; the first cause: {cause}. Mend the reward, then `raylign resume`"
            )
        self._check_drafts([group.exploration for group in groups if group.exploration is not None], where)

    def _check_drafts(self, seen: Sequence[Exploration], where: str) -> None:
        failed, total = sum(one.num_failed for one in seen), sum(len(one.totals) for one in seen)
        if failed > self._config.max_failed_fraction * total:
            cause = next(one.cause for one in seen if one.cause)
            raise RewardError(
                f"{where}: {failed} of {total} drafts have no reward, more than max_failed_fraction = "
                f"{self._config.max_failed_fraction}, so what is drawn again is hardly selected; the first cause: "
                f"{cause}. Mend the reward or raise rollout.explore.precision, then `raylign resume`"
            )

    async def _hand_off(self, version: WeightVersion) -> None:
        await self._publish(version)
        if version % self._config.rollout.parity_every_steps == 0 or self.guard.wants_parity(version):
            await self._check_parity(version)
        await self._evaluate_if_due(version)
        await self._buffer.release(self._config.groups_per_step)

    async def _publish(self, version: WeightVersion) -> None:
        with self._phases.timed("publish"):
            snapshot = await self._learner.publish(version, "rollout")
        with self._phases.timed("pull"):
            self._pulled = pull_metrics(await self._pull(snapshot, "rollout"))

    async def _pull(self, snapshot: SnapshotHandle, slot: WeightSlot) -> Sequence[Pulled]:
        pulls = await self._fleet.pull(snapshot, slot)
        if self._tell_pulls is not None:
            self._tell_pulls(slot, [pull.work for pull in pulls if pull.work is not None])
        return pulls

    async def _check_parity(self, version: WeightVersion) -> None:
        """The parity gate: every actor and the learner predict alike, or the run stops before it trains on the gap.

        With groups of later steps admitted already it trains those, draws no other, and stops if the gap stays.
        """

        def gap(tolerance: float) -> float:
            return max(parity_gap(probe, answer, tolerance) for probe in probes)

        with self._phases.timed("parity"):
            probes = await self._fleet.probe_all(self._prompts.prompts[0].text)
            answer = await self._learner.predict(probes[0])
            try:
                self._parity = {"parity/gap": gap(self._config.parity_tolerance)}
            except NumericsError as error:
                if not self.guard.forgives_gap(version, self._buffer.last_step):
                    raise
                try:
                    self._parity = {"parity/gap": gap(sys.float_info.max)}
                except NumericsError:  # not finite, which no waiting mends
                    raise error from None
                await self._follow_guard(self.guard.gap(self._buffer.last_step))

    async def _follow_guard(self, changed: str | None) -> None:
        """Let the buffer admit as the guard now allows; `changed` names why, if something did."""
        if changed is None:
            return
        self._events.append(changed)
        if self.guard.limit == 0:
            self._old_until = self._buffer.last_step
        await self._buffer.limit(self.guard.limit)

    def _evaluates(self, version: WeightVersion) -> bool:
        last = version == self._config.num_steps
        return bool(self._heldout) and (version % self._config.eval.every_steps == 0 or last)

    async def _evaluate_if_due(self, version: WeightVersion) -> None:
        if self._evaluates(version):
            with self._phases.timed("evaluate"):
                await self.evaluate(version)

    async def _heed(self, step: int, verdict: Verdict) -> bool:
        """Do what the guard against reward hacking says of a completed step; whether the loop ends here.

        To go back is to write the step's checkpoint with the best one's weights: the run goes on from that, as a
        resumed one would, so that nothing drawn or admitted since is trained on.
        """
        if verdict.stop:
            self.stop.set()
        if verdict.roll_back_to is not None:
            await self.watch.go_back(self._learner, verdict.roll_back_to)
            await self._save(step)
            self.went_back = True
            return True
        if verdict.adjust:
            await self.watch.adjust(self._learner)
        if verdict.is_best and self.watch.rolls_back:
            await self._save(step)
        return False

    def _everything(
        self, step: int, metrics: Mapping[str, float], groups: Sequence[RolloutGroup], seconds: float
    ) -> dict[str, float]:
        """The step's line of metrics."""
        phases = self._phases.drain()
        everything = step_metrics(groups, step, phases, seconds) | dict(metrics) | self._parity | self._pulled
        everything |= self.guard.metrics(self._events)
        if self._config.max_staleness > 0:
            level = self._buffer.num_ready, self._buffer.num_admitted
            everything |= {"buffer/ready": float(level[0]), "buffer/admitted": float(level[1])}
        self._events.clear()
        return everything


def check_age(groups: Sequence[RolloutGroup], newest: WeightVersion, max_staleness: int) -> None:
    """Raise StalenessError if a group was drawn with weights more than `max_staleness` versions old."""
    for group in groups:
        age = newest - group.min_version
        if age > max_staleness:
            raise StalenessError(
                f"group {group.sequence} of prompt {group.prompt.id!r} is {age} versions old, max_staleness is "
                f"{max_staleness}; this is a bug in the buffer, please report it"
            )

"""Which noise levels forward-process methods train at, and the noise they draw there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from learner.algorithms.awm import AwmConfig
from learner.algorithms.base import LossSetting
from learner.algorithms.crd import Crd, CrdConfig
from learner.algorithms.forward_base import noise_generators
from learner.algorithms.nft import Nft, NftConfig
from learner.batching import MicroBatch, StepData, cut
from learner.noise_levels import NoiseLevels, TrainTimes, dense_levels
from raylign.errors import ConfigError
from raylign.keys import generator
from tests.tiny_models import RUN_SEED, ToyPolicy, draw_groups, euler


def test_the_dense_grid_is_shifted_from_pure_noise_to_almost_none() -> None:
    levels = dense_levels(3.0)
    assert len(levels) == 1000
    # u = .5 becomes 1.5 / 2; the last, u = .001, .003 / 1.002.
    assert [float(levels[i]) for i in (0, 500, 999)] == pytest.approx([1.0, 0.75, 0.003 / 1.002])
    assert (levels.diff() < 0).all()


def test_a_stratified_draw_has_one_of_each_equal_part() -> None:
    levels = NoiseLevels(TrainTimes(grid="dense", draw="stratified", fraction=0.99), euler())
    assert TrainTimes(grid="dense", fraction=0.99).places(4) == range(990)
    seen = torch.stack([levels.draw(20, generator(number)) for number in range(50)])
    # Parts of 49 or 50 levels: part i starts at floor(990 i / 20).
    start = torch.tensor([990 * part // 20 for part in range(21)])
    assert ((seen >= start[:-1]) & (seen < start[1:])).all()
    assert len(seen[:, 7].unique()) > 20


def test_the_released_awm_setting_has_the_parts_of_its_code() -> None:
    # 14 steps, fraction .9, without the first: places 1 to 11, cut where linspace(1, 12, 7) rounds down to.
    levels = NoiseLevels(AwmConfig().times, euler(14))
    seen = torch.stack([levels.draw(6, generator(number)) for number in range(200)])
    assert seen.amin(dim=0).tolist() == [1, 2, 4, 6, 8, 10]
    assert seen.amax(dim=0).tolist() == [1, 3, 5, 7, 9, 11]


def test_a_permutation_draws_any_levels_once() -> None:
    levels = NoiseLevels(TrainTimes(), euler(6))
    draws = [levels.draw(5, generator(number)).tolist() for number in range(100)]
    assert all(len(set(draw)) == 5 for draw in draws)
    assert {draw[0] for draw in draws} == set(range(6))
    assert torch.equal(levels.sigmas, euler(6).sigmas_S1[:6])


def test_a_grid_without_a_level_is_refused() -> None:
    with pytest.raises(ConfigError, match="leaves none of 4 levels"):
        NoiseLevels(TrainTimes(fraction=0.3, with_first=False), euler(4))
    with pytest.raises(ConfigError, match=r"num_train_times is 6, but only 3 sampler steps can be trained"):
        AwmConfig().check_sampler(euler(5).config)
    with pytest.raises(ConfigError, match=r"algorithm\.num_train_times is 6"):
        Nft(NftConfig(num_train_times=6), LossSetting(euler(5)))


def test_crd_siblings_share_levels_and_nft_samples_do_not() -> None:
    config = CrdConfig()
    groups = draw_groups(ToyPolicy(), euler(), config.needs, num_groups=2)
    crd, nft = (make.items(groups[0], RUN_SEED, 1) for make in (Crd(config, setting()), Nft(NftConfig(), setting())))
    assert crd.shape == (4, 20)
    assert (crd == crd[0]).all()
    assert not (nft == nft[0]).all()
    assert not torch.equal(crd, Crd(config, setting()).items(groups[1], RUN_SEED, 1))


def test_noise_is_keyed_by_sample_and_level_and_redrawn_in_each_pass() -> None:
    batch = micro_batch(epoch=0)
    key, level = batch.keys[0], int(batch.item_N[0])
    first, again = (draws(replace(batch, epoch=epoch)) for epoch in (0, 1))
    assert torch.equal(first[0], torch.randn(3, generator=generator(*key, "train_noise", level)))
    assert torch.equal(again[0], torch.randn(3, generator=generator(*key, "train_noise", level, 1)))
    assert not torch.equal(draws(replace(batch, item_N=batch.item_N + 1))[0], first[0])


def draws(batch: MicroBatch) -> list[torch.Tensor]:
    return [torch.randn(3, generator=one) for one in noise_generators(batch)]


def setting() -> LossSetting:
    return LossSetting(euler(5))


def micro_batch(epoch: int) -> MicroBatch:
    algorithm = Nft(NftConfig(), setting())
    groups = draw_groups(ToyPolicy(), euler(5), algorithm.needs, num_groups=1)
    items = [algorithm.items(group, RUN_SEED, 1) for group in groups]
    data = StepData(groups, algorithm.credit(groups), items, [algorithm.shares(g) for g in groups], algorithm.needs)
    batches = cut(data, num_epochs=2, num_updates=1, rank=0, num_ranks=1, micro_batch_size=4)
    return next(batches[epoch].micro_batches())

"""`python -m docs.generator [--check]`: write the pages that are read from the code, or name those that are stale."""

from __future__ import annotations

import sys
from pathlib import Path

from docs.generator.algorithm_pages import algorithm_pages
from docs.generator.cli_pages import cli_page
from docs.generator.config_pages import models_of, run_page, union_page
from docs.generator.http_pages import http_page
from docs.generator.text import NOTE
from raylign.models import ModelConfig
from raylign.samplers import IMAGE_SAMPLERS, TOKEN_SAMPLERS
from rewards import AnyRewardConfig
from services.config import RunConfig
from services.reward_config import RewardServerConfig

_DOCS = Path(__file__).parents[1]
_ALGORITHMS = "../algorithms.md"
_INTRODUCTION = """A run's TOML file. No key has to be there; a typo is answered with the nearest key, and impossible
pairs are refused when the file is read. Any key can be set on the command line by its dotted name:
`--learner.lr 1e-4`, `--rewards.0.weight 2`. Several files are laid over each other, the later one
wins."""
_SERVER = """The file that `raylign serve-rewards` and `deploy/rewards_serve.yaml` read. A run's
`[reward_service]` has the keys of `[service]` too."""


def pages() -> dict[str, str]:
    """Every generated page, by path below `docs/`."""
    run = {"model": "models.md", "sampler": "samplers.md", "algorithm": _ALGORITHMS, "rewards": "rewards.md"}
    models, rewards = models_of(ModelConfig), models_of(AnyRewardConfig)
    samplers = [*IMAGE_SAMPLERS, *TOKEN_SAMPLERS]
    return {
        "reference/config.md": run_page("Configuration of a run", _INTRODUCTION, RunConfig, run),
        "reference/reward_server.md": run_page(
            "Configuration of a reward server", _SERVER, RewardServerConfig, {"rewards": "rewards.md"}
        ),
        "reference/models.md": union_page("[model]", "What each family is: [models](../models.md).", models),
        "reference/samplers.md": union_page("[sampler]", "What each does: [samplers](../samplers.md).", samplers),
        "reference/rewards.md": union_page(
            "[[rewards]]", "Each has a page in [docs/rewards](../own_reward.md).", rewards
        ),
        "reference/cli.md": cli_page(),
        "reference/http.md": http_page(),
        **algorithm_pages(),
    }


def main(arguments: list[str]) -> int:
    """Write what changed; with --check write nothing, and return 1 if anything would."""
    stale = 0
    for name, text in pages().items():
        path, wanted = _DOCS / name, NOTE + text
        if path.exists() and path.read_text(encoding="utf-8") == wanted:
            continue
        stale += 1
        print(f"{'stale' if '--check' in arguments else 'wrote'} docs/{name}")
        if "--check" not in arguments:
            path.parent.mkdir(exist_ok=True)
            path.write_text(wanted, encoding="utf-8")
    return int(stale > 0 and "--check" in arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

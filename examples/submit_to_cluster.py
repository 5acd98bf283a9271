"""Send a run to a Ray cluster, watch it, and say how it ended.

    python examples/submit_to_cluster.py quickstart_image --address http://head:8265 --num_steps 60

The cluster's token comes from RAY_AUTH_TOKEN_PATH; docs/jobs.md has what is checked before anything is sent.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from services.cli import parse_overrides
from services.config import load_run_config
from services.jobs import JobClient


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a TOML file, or the name of a shipped one")
    parser.add_argument("--address", help="URL of the cluster's dashboard")
    parser.add_argument("--run-dir", help="where the run writes, on the cluster")
    options, keys = parser.parse_known_args(arguments)

    client = JobClient.connect(options.address)
    config = load_run_config(options.config, parse_overrides(keys))
    submitted = client.submit(config, Path(options.config).stem, options.run_dir)
    print(f"{submitted.id} writes {submitted.run_dir}")
    for text in client.logs(submitted.id, follow=True):
        print(text, end="")
    job = client.status(submitted.id)
    print(f"{job.id}: {job.status}, step {job.step} of {job.num_steps}")
    return job.result


if __name__ == "__main__":
    sys.exit(main())

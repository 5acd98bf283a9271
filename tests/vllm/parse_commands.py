"""Run by .venv-vllm's Python: parses each `vllm serve` command line of a JSON list; prints what vLLM makes of them."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from typing import Any


def main() -> None:
    cli_args: Any = import_module("vllm.entrypoints.launchers.cli_args")
    argparse_utils: Any = import_module("vllm.utils.argparse_utils")
    wanted: list[list[str]] = json.loads(sys.argv[1])
    parser = cli_args.make_arg_parser(argparse_utils.FlexibleArgumentParser(prog="vllm serve"))
    read: list[dict[str, Any]] = []
    for argv in wanted:
        parsed = parser.parse_args(argv)
        read.append(
            {
                "model": parsed.model_tag,
                "name": parsed.served_model_name,
                "length": parsed.max_model_len,
                "domains": parsed.allowed_media_domains,
            }
        )
    sys.stdout.write(json.dumps(read))


if __name__ == "__main__":
    main()

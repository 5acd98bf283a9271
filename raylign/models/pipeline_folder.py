"""Reading a diffusers pipeline directory: is everything there, and loading all of it or the network alone.

Checks read small JSON files only, so a wrong directory is refused before anything is started.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from raylign.errors import ModelError
from raylign.precision import DTYPES, Precision


@dataclass(frozen=True, slots=True)
class PipelineForm:
    """What a family's directory must hold.

    pipeline: diffusers' class. network: the component that is trained, and network_class its class. components: all
    that must be there, the network included. left_out: optional ones that are not loaded, whether there or not.
    """

    pipeline: str
    network: str
    network_class: str
    components: Sequence[str]
    left_out: Sequence[str] = ()


def check_pipeline_folder(folder: Path, form: PipelineForm) -> None:
    """Raise ModelError for the first fault of a folder that lacks something its family needs."""
    if not folder.is_dir():
        raise ModelError(f"model.path {str(folder)!r} is no directory; give a diffusers {form.pipeline} directory")
    index = read_json(folder / "model_index.json")
    found = index.get("_class_name")
    if found != form.pipeline:
        raise ModelError(f"{folder} is a {found}, not a {form.pipeline}; choose the [model] type that fits it")
    for name in form.components:
        declared = index.get(name)
        if not declared or declared[1] is None:
            raise ModelError(f"{folder}/model_index.json names no {name}, which a {form.pipeline} needs")
        if not (folder / name).is_dir():
            raise ModelError(f"{folder} lacks its component folder {name}/ ({declared[1]}); is the download complete?")
    found = read_json(folder / form.network / "config.json").get("_class_name")
    if found != form.network_class:
        raise ModelError(f"{folder}/{form.network} is a {found}, not an {form.network_class}")


def component_config(folder: Path, component: str) -> dict[str, Any]:
    """A component's own configuration; schedulers keep theirs under another name."""
    name = "scheduler_config.json" if component == "scheduler" else "config.json"
    return read_json(folder / component / name)


def load_pipeline(
    folder: Path, form: PipelineForm, precision: Precision = "fp32", fp32_components: Sequence[str] = ()
) -> Any:
    """The whole diffusers pipeline of a checked directory, progress bars off.

    `fp32_components` keep single precision whatever `precision` is. Raises ModelError.
    """
    _quiet()
    import diffusers

    dtype: Any = DTYPES[precision]
    if precision != "fp32" and fp32_components:
        dtype = {"default": dtype} | dict.fromkeys(fp32_components, torch.float32)
    try:
        with torch.random.fork_rng(devices=[]):  # some networks draw starting values that the files then replace
            pipeline = getattr(diffusers, form.pipeline).from_pretrained(
                str(folder), dtype=dtype, local_files_only=True, **dict.fromkeys(form.left_out)
            )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelError(f"{folder} does not load as a {form.pipeline}: {error}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_network(folder: Path, form: PipelineForm, precision: Precision = "fp32") -> Any:
    """The trained component alone. Raises ModelError."""
    _quiet()
    import diffusers

    try:
        with torch.random.fork_rng(devices=[]):
            return getattr(diffusers, form.network_class).from_pretrained(
                str(folder), subfolder=form.network, dtype=DTYPES[precision], local_files_only=True
            )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelError(f"{folder}/{form.network} does not load: {error}") from error


def empty_network(folder: Path, form: PipelineForm) -> Any:
    """The trained component without values, on the meta device: what it is made of, for no memory."""
    _quiet()
    import diffusers

    with torch.device("meta"):
        return getattr(diffusers, form.network_class).from_config(component_config(folder, form.network))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ModelError for a file that is missing or unreadable."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path.parent} has no {path.name}; is it a diffusers pipeline directory?") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from None


def _quiet() -> None:
    """No loading bars or advice from the libraries: a run has its own screen, and every worker would repeat them."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library_logging in (diffusers_logging, transformers_logging):
        library_logging.disable_progress_bar()
        library_logging.set_verbosity_error()

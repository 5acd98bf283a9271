"""Lets torchvision's CUDA wheel be imported beside a CPU torch: on PYTHONPATH of a vLLM server on CPU, and only there.

Its compiled operators cannot load then, and its Python part fails as it registers shapes for two of them that nobody
declared. Declaring the two is all it takes; calling them still fails, and no vLLM model does.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

_REGISTERING = "torchvision._meta_registrations"
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class _Declaring(importlib.abc.Loader):
    """Declares the operators, then runs the module as ever."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._library: Any = None

    def exec_module(self, module: ModuleType) -> None:
        import torch

        if not torch._C._jit_get_schemas_for_operator("torchvision::nms"):
            self._library = torch.library.Library("torchvision", "FRAGMENT")
            for schema in _SCHEMAS:
                self._library.define(schema)
        self._inner.exec_module(module)


class _Finder(importlib.abc.MetaPathFinder):
    """Stands in for the one module; the loader stays alive in its spec, and the declarations with it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _REGISTERING:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None:
            spec.loader = _Declaring(spec.loader)
        return spec


sys.meta_path.insert(0, _Finder())

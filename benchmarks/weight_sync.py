"""From the learner's weights to the actors': what each stage takes, and the whole way from publish to visible.

    python benchmarks/weight_sync.py --json docs/benchmarks/weight_sync.json
    python benchmarks/weight_sync.py --stores object_store filesystem collective direct --json weight_stores.json

A learner process and 1 to 4 actor processes on a Ray cluster on this machine, with a network of linear layers of
Stable Diffusion 3.5 Medium's width, joined by the run's own `RayLearner` and `RayFleet`. Before each round every
trained number moves by one AdamW step. Kinds of snapshot:

    adapter       a LoRA in fp32, loaded into adapter layers     (wanted: visible in one actor after at most 100 ms)
    folded        the same, added into plain bf16 weights
    full          every weight; published in fp32 and in bf16
    delta         what changed since the version before, of the same weights

Prints one JSON object. `visible_s` is the wall time from the call of publish until every actor has verified and loaded
the version, median and p90 of the rounds; its parts are publish (copy to host memory and hash, and pack a delta),
transfer (into the object store, hand-over by the fleet, mapped by the actor) and pause (the slowest actor's pull: it
draws nothing meanwhile). `stages_s` times the parts of these alone, one at a time, without Ray: gather, hash, pack,
unpack, verify, load, fold and re-quantise.

With `--stores`, only this: adapter and full fp32, each by each of the weight stores (`direct` needs the package nixl).
Whatever the store does in the learner belongs to publish, and in the actor to pause. `floor_s` is what the bytes take
at the least in this run: one copy in memory, and one write and one read of a file in the folder of the file system.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from raylign.models.adapters import LoraSettings, fold_lora
from raylign.models.tuned import TunedWeights, Tuning
from raylign.precision.config import QuantizerConfig
from raylign.precision.quantizer import make_quantizer
from raylign.precision.shadow import Shadow
from raylign.weight_delta import apply_delta, make_delta, worthwhile_delta
from raylign.weights import WeightSnapshot, check_contents, make_snapshot, view_snapshot
from rollout.drawn import Pulled
from services.weight_stores import (
    CollectiveStoreConfig,
    DirectStoreConfig,
    FilesystemStoreConfig,
    ObjectStoreConfig,
    Seat,
    Ticket,
    WeightStoreConfig,
    make_weight_store,
    take,
)

ROOT = Path(__file__).parents[1]
TARGET_S = 0.1
WIDTH, RANK = 1536, 32
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GRADIENT = 1e-3
CASES: dict[str, dict[str, Any]] = {
    "adapter fp32": {"tuning": "lora", "dtype": "fp32"},
    "folded fp32": {"tuning": "lora", "dtype": "fp32", "fold": True},
    "full fp32": {"tuning": "full", "dtype": "fp32"},
    "delta fp32": {"tuning": "full", "dtype": "fp32", "delta": True},
    "full bf16": {"tuning": "full", "dtype": "bf16"},
    "delta bf16": {"tuning": "full", "dtype": "bf16", "delta": True},
}
COMPARED = ("adapter fp32", "full fp32")
"""Cases in which stores are compared."""
STORES = ("object_store", "filesystem", "collective", "direct")
BY_RAY = ObjectStoreConfig()
FEW = 3
"""Rounds of the stages that take seconds."""


def network(num_layers: int, dtype: torch.dtype) -> nn.Module:
    """Linear layers `layers.0` ... with keyed weights."""
    layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False, dtype=dtype) for _ in range(num_layers))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.normal_(0, WIDTH**-0.5, generator=generator)
    holder = nn.Module()
    holder.layers = layers
    return holder


def tuned(case: Mapping[str, Any], num_layers: int, role: str) -> tuple[nn.Module, TunedWeights]:
    """What a policy of this case holds: the learner fp32 masters, an actor the precision it draws in."""
    tuning: Tuning = case["tuning"]
    frozen = torch.bfloat16 if tuning == "lora" else torch.float32
    made = network(num_layers, frozen if role == "learner" or tuning == "lora" else DTYPES[case["dtype"]])
    targets = tuple(f"layers.{index}" for index in range(num_layers))
    fold = role == "actor" and case.get("fold", False)
    return made, TunedWeights(made, tuning, LoraSettings(rank=RANK, alpha=2.0 * RANK), targets, fold=fold, seed=0)


class Source:
    """The learner's process: trained weights that move, and the verbs of a rank that publish them."""

    def prepare(self, case: Mapping[str, Any], num_layers: int, lr: float, store: WeightStoreConfig = BY_RAY) -> None:
        """Start afresh with weights of one kind, to be sent one way."""
        torch.set_num_threads(1)
        _, self._tuned = tuned(case, num_layers, "learner")
        self._dtype = DTYPES[case["dtype"]]
        self._optimizer = torch.optim.AdamW(self._tuned.parameters().values(), lr=lr)
        self._generator = torch.Generator().manual_seed(1)
        self._published: WeightSnapshot | None = None
        self._stamps = (0.0, 0.0)
        self._store: Any = make_weight_store(store, get)

    def move(self) -> None:
        """One AdamW step."""
        for parameter in self._tuned.parameters().values():
            parameter.grad = torch.empty_like(parameter).normal_(0, GRADIENT, generator=self._generator)
        self._optimizer.step()

    def snapshot(self, version: int) -> WeightSnapshot:
        """As a policy exports it; weights that travel in bf16 are rounded from the masters."""
        tensors = self._tuned.parameters()
        return self._tuned.export(version, {name: tensor.to(self._dtype) for name, tensor in tensors.items()})

    def publish(self, version: int, which: str) -> tuple[Ticket, tuple[str, str]]:
        """What `services.worker_actor.Worker` does."""
        began = time.monotonic()
        snapshot = self.snapshot(version)
        ticket = self._store.put(snapshot, which)
        self._stamps = (began, time.monotonic())
        return ticket, (snapshot.kind, snapshot.sha256)

    def send(self, seat: Seat) -> str:
        """The learner's part of a broadcast."""
        return self._store.send(seat)

    def publish_changes(
        self, version: int, which: str
    ) -> tuple[WeightSnapshot | None, WeightSnapshot, tuple[str, str]]:
        """The same of what changed, as `learner.learner.Learner` finds it."""
        began = time.monotonic()
        whole, base = self.snapshot(version), self._published
        self._published = whole
        delta = None if base is None else worthwhile_delta(base, whole)
        self._stamps = (began, time.monotonic())
        return delta, whole, ((delta or whole).kind, whole.sha256)

    def stamps(self) -> tuple[float, float]:
        """When the last publish began and ended."""
        return self._stamps


class Sink:
    """An actor's process: weights that are pulled."""

    def prepare(self, case: Mapping[str, Any], num_layers: int, store: WeightStoreConfig = BY_RAY) -> None:
        """Start afresh, holding nothing."""
        torch.set_num_threads(1)
        self._network, self._tuned = tuned(case, num_layers, "actor")
        self._held: WeightSnapshot | None = None
        self._pulled: dict[str, Any] = {}
        self._store: Any = make_weight_store(store, get)

    def ping(self) -> str:
        """For the fleet."""
        return "pong"

    def apply(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """For the fleet."""
        return func(self, *args, **kwargs)

    def pull(self, snapshot: Ticket, slot: str) -> Pulled:
        """Fetch, unpack a delta, verify and load."""
        began = time.monotonic()

        def load(fetched: WeightSnapshot) -> None:
            whole = apply_delta(self._held, fetched) if fetched.kind == "delta" else fetched
            self._tuned.load(whole)
            self._held = whole

        _, came = take(self._store, snapshot, load)
        num_bytes, kind = came.snapshot.num_bytes, came.snapshot.kind
        if came.detour:
            raise SystemExit(f"not by the store that was asked for: {came.detour}")
        self._pulled = {"began": began, "ended": time.monotonic(), "bytes": num_bytes, "kind": kind}
        return Pulled(came.snapshot.version, num_bytes, 0.0)

    def pulled(self) -> dict[str, Any]:
        """When the last pull began and ended, and what travelled."""
        return self._pulled


async def measure_all(layers: Mapping[str, int], options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Every case with every number of actors, by the same processes."""
    import ray

    from services.fleet import RayFleet

    remote: Any = ray.remote
    ours = {"num_cpus": 0, "enable_tensor_transport": "direct" in options.stores}
    source = remote(Source).options(**ours).remote()
    sinks = [remote(Sink).options(**ours).remote() for _ in range(max(options.actors))]
    # Closing a fleet ends its actors.
    fleets = {count: RayFleet(sinks[:count]) for count in options.actors}
    stores = {f" by {kind}": stores_of(options)[kind] for kind in options.stores} or {"": BY_RAY}
    found: dict[str, dict[str, Any]] = {name + way: {} for name in layers for way in stores}
    for name, num_layers in layers.items():
        for count, fleet in fleets.items():
            for way, store in stores.items():
                rows = await measure(CASES[name], num_layers, source, sinks[:count], fleet, options, store)
                found[name + way][str(count)] = summary(rows)
    for fleet in fleets.values():
        await fleet.close()
    return found


async def measure(
    case: Mapping[str, Any],
    num_layers: int,
    source: Any,
    sinks: list[Any],
    fleet: Any,
    options: argparse.Namespace,
    store: WeightStoreConfig,
) -> list[dict[str, Any]]:
    """The whole way, in rounds; the first two are left out."""
    import ray

    from services.publication import Broadcasts
    from services.ray_learner import RayLearner

    lr = options.adapter_lr if case["tuning"] == "lora" else options.full_lr
    await asyncio.gather(
        source.prepare.remote(case, num_layers, lr, store),
        *(sink.prepare.remote(case, num_layers, store) for sink in sinks),
    )
    broadcasts = None
    if isinstance(store, CollectiveStoreConfig):
        broadcasts = Broadcasts(source, "gloo", store.timeout_s, ray.util.get_node_ip_address())
    learner = RayLearner([source], deltas=case.get("delta", False), broadcasts=broadcasts)
    rows: list[dict[str, Any]] = []
    for version in range(options.rounds + 2):
        await source.move.remote()
        began = time.monotonic()
        published = await learner.publish(version, "rollout")
        await fleet.pull(published, "rollout")
        ended = time.monotonic()
        first, done = await source.stamps.remote()
        pulls = await asyncio.gather(*(sink.pulled.remote() for sink in sinks))
        rows.append(
            {
                "visible": ended - began,
                "publish": done - first,
                "transfer": max(pull["began"] for pull in pulls) - done,
                "pause": max(pull["ended"] - pull["began"] for pull in pulls),
                "bytes": pulls[0]["bytes"],
                "kind": pulls[0]["kind"],
            }
        )
    return rows[2:]


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians and 90th percentiles; bytes and kinds as they were."""
    found: dict[str, Any] = {
        f"{part}_s": spread([row[part] for row in rows]) for part in ("visible", "publish", "transfer", "pause")
    }
    return found | {
        "sent_bytes": int(statistics.median(row["bytes"] for row in rows)),
        "kinds": sorted({row["kind"] for row in rows}),
        "rounds": len(rows),
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median and 90th percentile (nearest rank), and the extremes."""
    ordered = sorted(values)
    return {
        "median": statistics.median(ordered),
        "p90": ordered[-(-9 * len(ordered) // 10) - 1],
        "least": ordered[0],
        "most": ordered[-1],
    }


def timed(rounds: int, work: Callable[[], object]) -> dict[str, float]:
    """Seconds of a piece of work, after one that is not counted."""
    times: list[float] = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return spread(times[1:])


def stages(name: str, num_layers: int, options: argparse.Namespace) -> dict[str, Any]:
    """Each part of publish and pull alone, in this process, without Ray."""
    case = CASES[name]
    source = Source()
    source.prepare(case, num_layers, options.adapter_lr if case["tuning"] == "lora" else options.full_lr)
    before = source.snapshot(0)
    source.move()
    after = source.snapshot(1)
    shapes = {entry.name: entry.shape for entry in after.entries}
    views = view_snapshot(after, shapes)
    copies = {tensor_name: torch.empty_like(tensor) for tensor_name, tensor in views.items()}

    def copy() -> None:
        for tensor_name, tensor in views.items():
            copies[tensor_name].copy_(tensor)

    found: dict[str, Any] = {
        "num_bytes": after.num_bytes,
        "num_tensors": len(after.entries),
        "gather_and_hash": timed(options.rounds, lambda: make_snapshot(copies, 1, after.kind)),
        "hash": timed(options.rounds, lambda: check_contents(after)),
        "load": timed(options.rounds, copy),
    }
    found["verify"] = timed(options.rounds, lambda: view_snapshot(after, shapes))
    if case.get("delta"):
        delta = make_delta(before, after)
        found |= {
            "delta_bytes": delta.num_bytes,
            "changed_share": changed_share(before, after),
            "pack": timed(options.rounds, lambda: make_delta(before, after)),
            "unpack_and_verify": timed(options.rounds, lambda: apply_delta(before, delta)),
        }
    if case.get("fold"):
        found |= folding(num_layers, views, options)
    return found


def changed_share(before: WeightSnapshot, after: WeightSnapshot) -> float:
    """Share of numbers whose bits changed."""
    pairs = [(before.arrays[dtype], array) for dtype, array in after.arrays.items()]
    return sum(int((old.view("u1") != new.view("u1")).reshape(-1, new.itemsize).any(1).sum()) for old, new in pairs) / (
        sum(new.size for _, new in pairs)
    )


def folding(num_layers: int, tensors: Mapping[str, torch.Tensor], options: argparse.Namespace) -> dict[str, Any]:
    """Adding the adapter into the weights, and quantising the sums again."""
    made = network(num_layers, torch.bfloat16)
    pristine: dict[str, torch.Tensor] = {}
    quantizer = make_quantizer(options.format, QuantizerConfig(backend="reference"), "cpu")
    shadow = Shadow(made, quantizer, [f"layers.{index}" for index in range(num_layers)])
    return {
        "fold": timed(FEW, lambda: fold_lora(made, tensors, 2.0, pristine)),
        "requantise": timed(FEW, shadow.refresh),
        "requantise_to": {"format": options.format, "backend": "reference", "bytes": shadow.packed_bytes},
        "num_folded_weights": num_layers * WIDTH**2,
    }


def num_layers_of(case: Mapping[str, Any], options: argparse.Namespace) -> int:
    """Layers whose trained numbers take the wanted megabytes in fp32."""
    if case["tuning"] == "lora":
        return max(1, round(options.adapter_mb * 1e6 / (2 * RANK * WIDTH * 4)))
    return max(1, round(options.full_mb * 1e6 / (WIDTH**2 * 4)))


def get(reference: Any) -> Any:
    """What a reference into Ray's object store stands for."""
    import ray

    return ray.get(reference)


def stores_of(options: argparse.Namespace) -> dict[str, WeightStoreConfig]:
    """The ways to compare."""
    ways: dict[str, Callable[[], WeightStoreConfig]] = {
        "object_store": ObjectStoreConfig,
        "filesystem": lambda: FilesystemStoreConfig(path=str(options.folder)),
        "collective": lambda: CollectiveStoreConfig(backend="gloo"),
        "direct": DirectStoreConfig,
    }
    return {kind: ways[kind]() for kind in options.stores}


def floors(num_bytes: int, options: argparse.Namespace) -> dict[str, Any]:
    """What so many bytes take at the least: one copy in memory; a file written and read in the same folder."""
    data = np.random.default_rng(0).integers(0, 255, num_bytes, np.uint8)
    copy, path = np.empty_like(data), options.folder / "floor"
    found = {
        "num_bytes": num_bytes,
        "memory_copy": timed(options.rounds, lambda: np.copyto(copy, data)),
        "file_write": timed(options.rounds, lambda: data.tofile(path)),
        "file_read": timed(options.rounds, lambda: np.fromfile(path, np.uint8)),
    }
    path.unlink()
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter-mb", type=float, default=40, help="size of the adapter, in fp32")
    parser.add_argument("--full-mb", type=float, default=200, help="size of the fully trained weights, in fp32")
    parser.add_argument("--cases", nargs="+", default=tuple(CASES), choices=tuple(CASES), help="kinds of snapshot")
    parser.add_argument("--actors", nargs="+", type=int, default=(1, 2, 4), help="actors that pull at once")
    parser.add_argument("--rounds", type=int, default=11, help="measured versions of each")
    parser.add_argument("--adapter-lr", type=float, default=3e-4, help="learning rate of an adapter")
    parser.add_argument("--full-lr", type=float, default=1e-5, help="learning rate of all weights: how much changes")
    parser.add_argument("--stores", nargs="+", default=(), choices=STORES, help="compare these ways, and nothing else")
    parser.add_argument("--folder", type=Path, default=None, help="for filesystem; a temporary one when not given")
    parser.add_argument("--format", default="nvfp4", choices=("fp8", "nvfp4", "mxfp4"), help="of the folded weights")
    parser.add_argument("--hardware", default="", help="what it runs on, in words, for the JSON")
    parser.add_argument("--json", type=Path, default=None, help="also write the JSON to this file")
    options = parser.parse_args()
    from services.process import local_cluster, prepare_environment

    prepare_environment()
    torch.set_num_threads(1)
    load_before = os.getloadavg()[0]
    cases = [case for case in options.cases if case in COMPARED] if options.stores else options.cases
    layers = {name: num_layers_of(CASES[name], options) for name in cases}
    alone = {} if options.stores else {name: stages(name, layers[name], options) for name in cases}
    with tempfile.TemporaryDirectory() as scratch:
        options.folder = options.folder or Path(scratch)
        with local_cluster(1 + max(options.actors), Path(scratch)):
            ways = asyncio.run(measure_all(layers, options))
        sizes = {row["sent_bytes"] for by_count in ways.values() for row in by_count.values()} if options.stores else ()
        least = [floors(num_bytes, options) for num_bytes in sorted(sizes)]
    report: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/weight_sync.py", *sys.argv[1:]]),
        "commit": subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True).strip(),
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": options.hardware,
        "load_before_and_after": [load_before, os.getloadavg()[0]],
        "setting": {"width": WIDTH, "rank": RANK, "layers": layers, "torch_threads": 1},
        "by_actors": ways,
        "stages_s": alone,
    }
    if options.stores:
        report |= {"floor_s": least, "folder": str(options.folder)}
    if "adapter fp32" in ways and "1" in ways["adapter fp32"]:
        found = ways["adapter fp32"]["1"]["visible_s"]
        report["adapter_visible_within_target"] = {
            "target_s": TARGET_S,
            "median": found["median"] <= TARGET_S,
            "p90": found["p90"] <= TARGET_S,
        }
    text = json.dumps(report, indent=1)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

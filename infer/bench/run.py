"""What `python -m infer.bench` does: models one after another, and the report of them."""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import platform
import shlex
import shutil
import threading
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from convert.loading.folder import open_folder, target_scheme
from glm2_jax import GLMConfig
from glm2_jax.cli import arguments, interrupt
from glm2_jax.cli.files import real_path
from glm2_jax.cli.main import EXIT_DEVICE, version
from glm2_jax.cli.messages import human_size, note
from glm2_jax.cli.model_choice import ModelChoice
from glm2_jax.cli.parser import from_flags
from glm2_jax.errors import UsageError
from glm2_jax.escape import json_line
from glm2_jax.mesh import mesh_text
from glm2_jax.runtime.devices import faster_layers, find_device, find_mesh
from glm2_jax.runtime.dtypes import dtype_name, resolve_dtype
from glm2_jax.runtime.host_memory import find_memory, read_text
from glm2_jax.schemes import SCHEMES
from glm2_jax.sharding import check_mesh
from infer import startup
from infer.bench import consumer, plot
from infer.bench.ceilings import Ceilings, measure_ceilings
from infer.bench.measure import Result, Shape, Variant, measure_all
from infer.bench.peer import Peer, PeerError, missing
from infer.bench.random_params import random_params
from infer.bench.report import Report, as_json, markdown, render, variant_name, what
from infer.engine.load import demo_folder, load
from infer.memory.shares import sizes_of, weight_share

PROG = "python -m infer.bench"
_BITS = {"float32": 32, "none": 16, "int8": 8, "int4": 4}


def run(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Measures what the flags name and prints it; returns the exit code.

    Raises:
      GLMError: the model, the device or a file is not what it should be.
    """
    if args.plot:
        arguments.check_plot(args.plot)
    for path in (args.plot, args.markdown):
        if path and not (place := real_path(path)).parent.is_dir():
            raise UsageError(f"{path} cannot be written.", "Its folder does not exist.")
        if path and place.is_dir():
            raise UsageError(f"{path} is a folder.", fix="Name a file in it.")
    if args.preset:
        consumer.apply(args)
    mesh = find_mesh(args.mesh, args.device)
    device = find_device(args.device) if mesh is None else mesh.devices.flat[0]
    measuring = not args.preset or consumer.wanted(args, device.platform)
    if args.plot and not measuring:
        raise UsageError(
            "--plot: nothing will be measured, so there is nothing to draw.",
            consumer.UNMEASURED,
            "Leave --plot out, or add --device cpu.",
        )
    subject = Subject(args, device, mesh)
    subject.check_forms(args.quantize or (None,))
    sizes = None if mesh is None else dict(mesh.shape)
    report = Report(about(args, argv, device, subject), mesh=sizes)
    output = _Output(args, report)
    with interrupt.always(output):
        if measuring:
            _measure(args, device, subject, report)
        else:
            report.unmeasured.append(consumer.UNMEASURED)
        report.complete = True
    if args.plot:
        plot.draw(report, args.plot)
    return EXIT_DEVICE if any(not result.seconds for result in report.results) else 0


def _measure(args: argparse.Namespace, device: Any, subject: Subject, report: Report) -> None:
    note(f"measuring what {device.device_kind} can do at most ...")
    report.ceilings = _ceilings(device, subject.mesh)
    with contextlib.ExitStack() as stack:
        peer = _open_peer(args, device, report, stack)
        for result in _results(args, subject, peer, report):
            report.results.append(result)
            note(_line(result))
    # Once more: a share of more than 100 per cent would only say that the machine was busy.
    report.ceilings = report.ceilings.better(_ceilings(device, subject.mesh))
    report.about["load average"] += f", {_load()} at the end"


def _ceilings(device: Any, mesh: Mesh | None) -> Ceilings:
    """Of all devices together: one's, times their number. Those that a processor plays share its
    memory and its cores, all of which one of them takes alone."""
    found = measure_ceilings(device)
    return found if mesh is None or device.platform == "cpu" else found.times(mesh.size)


class Subject:
    """The model that is measured, in whichever form.

    Attributes:
      device: where it is; on a mesh one of its devices, which stands for all.
      mesh: over which it is spread; None = one device.
      config: None until a folder has been opened.
      name: for people.
    """

    def __init__(self, args: argparse.Namespace, device: Any, mesh: Mesh | None = None):
        self.args, self.device, self.mesh = args, device, mesh
        self.config: GLMConfig | None = None
        self.folder: str | None = None
        if args.random:
            from convert.random import official_config

            raw = official_config(args.random, layers=args.layers, flag="--random")
            self.config = GLMConfig.from_hf(raw)
            self.name = f"{Path(args.random).name}, random weights"
        else:
            startup.note_demo_model(from_flags(ModelChoice, args))
            self.folder = startup.model_folder(from_flags(ModelChoice, args))
            self.name = "demo (bundled)" if self.folder is None else Path(self.folder).name

    def check_forms(self, forms: Sequence[str | None]) -> None:
        """Before anything is measured: whether the model can be had in these forms, on the mesh.

        Raises:
          UsageError: it is quantized already, or the mesh does not fit it. CheckpointError: it
            cannot be opened.
        """
        if self.config is not None:
            schemes = [SCHEMES.get(quantize or "none") for quantize in forms]
            config = self.config
        else:
            found = open_folder(
                self.folder or demo_folder(), **from_flags(ModelChoice, self.args).form
            )
            schemes = [target_scheme(found, quantize) for quantize in forms]
            config = found.config
        if self.mesh is not None:
            for scheme in schemes:
                check_mesh(config, self.mesh, scheme)

    def open(self, dtype: str, quantize: str | None, layers: str) -> tuple[Variant, Any]:
        """The parameters in a form, and what became of it."""
        if self.config is not None and self.args.random:
            target = resolve_dtype(dtype, num_params=self.config.num_params, device=self.device)
            quantization = quantize or "none"
            scheme = SCHEMES.get(quantization)
            as_list = layers == "list"
            params = random_params(
                self.config,
                target,
                scheme=scheme,
                as_list=as_list,
                device=self.device if self.mesh is None else None,
                mesh=self.mesh,
            )
        else:
            checkpoint = load(
                self.folder,
                dtype=dtype,
                quantize=quantize,
                layers=layers,
                mesh=self.mesh,
                device=self.device if self.mesh is None else None,
                **from_flags(ModelChoice, self.args).form,
            ).checkpoint
            self.config, params = checkpoint.config, checkpoint.params
            quantization = checkpoint.summary.quantization or "none"
        weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        return Variant(
            dtype_name(params["final_norm"].dtype), quantization, layers, weights
        ), params


def _results(
    args: argparse.Namespace, subject: Subject, peer: Peer | None, report: Report
) -> Iterator[Result]:
    mesh = subject.mesh
    layouts = args.layout or (faster_layers(subject.device.platform, on_mesh=mesh is not None),)
    forms = product(args.dtypes, args.quantize or (None,), layouts)
    # The smallest first: the peak of a GPU's memory is known since the start only.
    for dtype, quantize, layers in sorted(forms, key=lambda form: _bits(*form[:2])):
        variant, params = subject.open(dtype, quantize, layers)
        config = subject.config
        assert config is not None
        share = ""
        if mesh is not None:
            size = weight_share(config, variant.precision, sizes_of(mesh.shape))
            share = f", {human_size(size)} on each device"
        note(f"{variant_name(variant)}: {human_size(variant.weights)} of weights{share}")
        opened = _open_in_peer(peer, config, variant, report)
        shapes = _shapes(args, config, report)
        yield from measure_all(config, params, variant, shapes, repeats=args.repeat, peer=opened)
        del params
        gc.collect()  # before the next one is made


def _bits(dtype: str, quantize: str | None) -> int:
    if quantize in ("int8", "int4"):
        return _BITS[quantize]
    return _BITS["float32" if dtype in ("float32", "fp32") else "none"]


def _shapes(args: argparse.Namespace, config: GLMConfig, report: Report) -> list[Shape]:
    """What the flags ask for, as far as the model goes."""
    wanted = [Shape(batch=1, prompt=length) for length in args.prompts]
    wanted += [
        Shape(batch=batch, context=context, steps=args.steps)
        for batch, context in product(args.batches, args.contexts)
    ]
    for shape in wanted:
        line = f"{shape.length} tokens, more than the {config.seq_length} that the model knows"
        if shape.length > config.seq_length and line not in report.unmeasured:
            report.unmeasured.append(line)
    return [shape for shape in wanted if shape.length <= config.seq_length]


def _open_peer(
    args: argparse.Namespace, device: Any, report: Report, stack: contextlib.ExitStack
) -> Peer | None:
    if args.peer is None:
        return None
    if problem := missing(args.peer):
        report.unmeasured.append(problem)
        note(problem)
        return None
    peer = Peer(args.peer, device.platform)
    stack.enter_context(interrupt.always(peer.close))
    return peer


def _open_in_peer(
    peer: Peer | None, config: GLMConfig, variant: Variant, report: Report
) -> Peer | None:
    """The peer with the same shapes and dtype, or None where it cannot; it quantizes nothing."""
    if peer is None or variant.quantization != "none":
        return None
    try:
        peer.open(config, variant.dtype)
    except PeerError as error:
        report.unmeasured.append(f"{variant.dtype} with {error}")
        return None
    versions = ", ".join(f"{name} {number}" for name, number in peer.about["versions"].items())
    report.about["peer"] = (
        f"{versions}, {peer.about['threads']} threads, {' and '.join(peer.modes)}"
    )
    return peer


class _Output:
    """Prints the report and writes the files once, when everything is measured or the end comes."""

    def __init__(self, args: argparse.Namespace, report: Report):
        self._args, self._report, self._once = args, report, threading.Lock()

    def __call__(self) -> None:
        if not self._once.acquire(blocking=False):
            return
        if self._args.json:
            text = json_line(as_json(self._report))
        elif self._args.preset:
            parts = (render, consumer.render)
            text = "\n\n".join(part(self._report, columns()) for part in parts)
        else:
            text = render(self._report, columns())
        print(text, flush=True)
        if self._args.markdown:
            Path(self._args.markdown).write_text(markdown(self._report), encoding="utf-8")


def columns() -> int:
    return max(shutil.get_terminal_size((160, 24)).columns, 20)


def _line(result: Result) -> str:
    return f"{what(result)}: {f'{result.rate:.4g} tok/s' if result.seconds else result.problem}"


def about(
    args: argparse.Namespace, argv: Sequence[str], device: Any, subject: Subject
) -> dict[str, str]:
    """What everything is measured on."""
    from glm2_jax.runtime.probing import PACKAGES, PLUGINS, find_nvidia, installed

    driver = find_nvidia().driver if device.platform == "gpu" else ""
    versions = {k: v for k, v in installed(PACKAGES + PLUGINS).items() if k != "glm2-jax"}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = find_memory().total
    name = processor()
    return {
        "model": subject.name,
        "device": name if device.platform == "cpu" else device.device_kind,
        **_mesh_line(subject.mesh, device.platform),
        "host": f"{name}, {cores} cores" + (f", {human_size(memory)}" if memory else ""),
        "versions": ", ".join(
            [
                version(),
                *(f"{package} {number}" for package, number in versions.items()),
                f"Python {platform.python_version()}",
                f"{platform.system()} {platform.machine()}",
                *([f"driver {driver}"] if driver else []),
            ]
        ),
        "repetitions": f"{args.repeat}, of {args.steps} steps",
        "load average": f"{_load()} at the start",
        "command": f"{PROG} {shlex.join(argv)}".rstrip(),
    }


def _mesh_line(mesh: Mesh | None, platform: str) -> dict[str, str]:
    if mesh is None:
        return {}
    sizes = mesh_text(mesh.shape)
    if mesh.size == 1:
        return {"mesh": f"{sizes}, 1 device"}
    if platform != "cpu":
        return {"mesh": f"{sizes}, {mesh.size} devices"}
    return {
        "mesh": f"{sizes}, {mesh.size} virtual devices of one processor, which share its memory "
        "and its cores: what it can do at most is not multiplied"
    }


def processor() -> str:
    """The name of the processor."""
    for line in read_text(Path("/proc/cpuinfo")).splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _load() -> str:
    return f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"

"""The device or mesh that a run uses, and what its errors mean."""

import contextlib
import errno
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from glm2_jax.choices import DEVICES, unknown_device
from glm2_jax.errors import CheckpointError, DeviceError, UsageError
from glm2_jax.limits import FEW_ROWS, LONG_CACHE
from glm2_jax.mesh import AXES, make_mesh, parse_mesh

Shortage = tuple[str, str]  # needed and free; what fits instead


def find_device(name: Any) -> Any:
    """Return the first device of a kind, one of `choices.DEVICES`; None = "auto".

    A `jax.Device` is returned as it is. Raises UsageError for another name, and DeviceError if this
    machine, or this JAX, has no such device.
    """
    if isinstance(name, jax.Device):
        return name
    name = "auto" if name is None else name
    if name not in DEVICES:
        raise UsageError(unknown_device(name))
    try:
        return jax.local_devices(backend=None if name == "auto" else name)[0]
    except (RuntimeError, AssertionError) as error:  # the latter if none can be initialized
        reason = (str(error).splitlines() or ["JAX could not initialize any device."])[0]
        platforms = os.environ.get("JAX_PLATFORMS")
        fix = "Use device 'auto' or 'cpu', or install the JAX package for that device."
        if platforms:
            fix = f"JAX_PLATFORMS={platforms} restricts the choice: unset it, or use device 'cpu'."
        raise DeviceError(f"no device {name!r} was found", reason, fix) from error


def find_mesh(mesh: Any, device: Any = None) -> Mesh | None:
    """Return a mesh of all devices of a kind, as `find_device` takes it; None = one device.

    The mesh is a text such as "data=2,tensor=4", axis -> size, or a `jax.sharding.Mesh`, which is
    checked. Raises UsageError if it is not valid or takes more or fewer devices than there are, or
    if there are several processes and no mesh.
    """
    if mesh is None:
        # In this order, since the second starts jax's devices.
        if not jax.distributed.is_initialized() or jax.process_count() == 1:
            return None
        raise UsageError(
            "several processes need --mesh or --tp",
            "The mesh says how their devices share the work.",
            f"Use for example --mesh data={jax.device_count()}.",
        )
    named = device not in (None, "auto")
    if isinstance(device, jax.Device) or (isinstance(mesh, Mesh) and named):
        raise UsageError(
            f"device={device!r} contradicts mesh={mesh!r}",
            "A mesh uses all devices of a kind, and a `jax.sharding.Mesh` names its own.",
            "Name a kind for the text of a mesh, or omit device.",
        )
    if isinstance(mesh, Mesh):
        if set(mesh.axis_names) != set(AXES):
            raise UsageError(
                f"a mesh with the axes {', '.join(map(str, mesh.axis_names))} is not supported",
                f"Its axes must be {', '.join(AXES)}, in any order; unused ones have size 1.",
                "Make it with glm2_jax.make_mesh.",
            )
        return mesh
    if isinstance(mesh, Mapping):
        mesh = ",".join(f"{axis}={size}" for axis, size in mesh.items())
    if not isinstance(mesh, str):
        raise UsageError(f"mesh={mesh!r} is not a mesh", fix="Write it like data=2,tensor=4.")
    return make_mesh(parse_mesh(mesh), jax.devices(find_device(device).platform))


def faster_layers(platform: str, *, on_mesh: bool = False, rows: int = 1, slots: int = 0) -> str:
    """Return the layout of the layers that decodes `rows` rows faster: "stacked" or "list"; `slots`
    is how many tokens of each are in the cache, 0 = few.

    On a CPU a scan over stacked layers copies each layer out first, and takes three times as long.
    XLA:GPU at few rows and XLA:TPU fuse that (checked in compiled programs, not measured), and
    compile a stacked model in a tenth of the time. For more rows, and on a mesh, products are plain
    dots, for which XLA:GPU copies each layer, too; and it always copies stacked keys and values.
    """
    copies = on_mesh or rows > FEW_ROWS or rows * slots > LONG_CACHE
    return "list" if platform == "cpu" or (platform == "gpu" and copies) else "stacked"


def layers_to_train(platform: str, remat: str, *, on_mesh: bool = False) -> str:
    """Return the layout of a frozen base that trains faster, "stacked" or "list", for one of
    `choices.REMAT`."""
    # XLA:CPU moves the recomputing of a list of layers to where all of it is kept.
    recomputing = platform == "cpu" and remat != "none"
    return "stacked" if recomputing else faster_layers(platform, on_mesh=on_mesh)


@contextlib.contextmanager
def device_errors(
    doing: str, explain: Callable[[], Shortage | None] = lambda: None
) -> Iterator[None]:
    """Turn running out of device or host memory into a DeviceError that says what would fit.

    `doing` is what is computed, with its sizes; `explain` is called for the rest of the message.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError, CheckpointError) as error:
        text, cause = str(error), error.__cause__
        if isinstance(error, CheckpointError):  # a file could not be mapped
            full = isinstance(cause, OSError) and cause.errno == errno.ENOMEM
        else:
            full = "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower()
        if not full and not isinstance(error, MemoryError):
            raise
        first = (text.splitlines() or ["an allocation failed"])[0]
        numbers, fix = explain() or ("", "Load a narrower dtype, or --quantize int8 or int4.")
        raise DeviceError(
            f"out of device memory: {doing}", f"{numbers} ({first})".strip(), fix
        ) from error

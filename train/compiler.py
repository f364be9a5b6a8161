"""A compiler's own figure for a training step: of this processor, or of a TPU where libtpu is
installed. It runs in a process of its own, `python -m train.compiler`."""

from __future__ import annotations

import dataclasses
import json
import sys
from functools import partial
from typing import Any

from glm2_jax.config import GLMConfig
from infer.memory import compiler
from infer.memory.cards import CARDS
from infer.memory.precision import Precision

_MODULE = "train.compiler"


def knows(device: str) -> bool:
    """Return whether a step can be compiled here for a device of this name."""
    return device == "cpu" or (compiler.knows(device) and compiler.installed())


def ask(plan: Any, device: str) -> tuple[int | None, str]:
    """Compile the step of a `train.memory.TrainingPlan` without a mesh for a device that the
    compiler `knows`; return its peak bytes, parameters included, or None, and why."""
    topology = None if device == "cpu" else CARDS[device].topology
    fields = ("batch", "length", "remat", "accumulate", "platform")
    request = {name: getattr(plan, name) for name in fields} | {
        "config": plan.config.to_fields(),
        "precision": dataclasses.asdict(plan.precision),
        "adapter": None if plan.adapter is None else dataclasses.asdict(plan.adapter),
        "kind": type(plan.adapter).__name__,
        "topology": topology,
    }
    answer = compiler.run_apart(_MODULE, request)
    return answer.get("peak"), compiler.first_sentence(answer.get("error", ""))


def peak_bytes(plan: Any, device: Any) -> int:
    """Return the peak bytes of a step on a device that need not be here, parameters and state
    included; raises JaxRuntimeError where it does not fit."""
    memory = compile_step(plan, device).memory_analysis()
    own = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return max(memory.peak_memory_in_bytes, own + memory.temp_size_in_bytes)


def compile_step(plan: Any, device: Any) -> Any:
    """Return the compiled step of a plan, made from shapes."""
    import jax
    import jax.numpy as jnp

    from glm2_jax import compiler_options
    from glm2_jax.runtime.devices import layers_to_train
    from infer.memory.shares import abstract_params
    from train.data.batch import Batch
    from train.memory import abstract_adapter
    from train.optim import make_optimizer
    from train.step import init_state, train_step

    layers = layers_to_train(device.platform, plan.remat)
    stacked = plan.adapter is None or layers == "stacked"
    base, dtype = abstract_params(plan.config, plan.precision, stacked=stacked), None
    effective = None
    if plan.adapter is not None:
        trained = abstract_adapter(plan.config, plan.adapter)
        effective = partial(plan.adapter.effective, plan.config)
    else:
        base, trained = None, abstract_params(plan.config, Precision("float32"))
        dtype = jnp.dtype(plan.precision.dtype)
    optimizer = make_optimizer(5e-5)
    state = jax.eval_shape(partial(init_state, optimizer), trained)
    tokens = jax.ShapeDtypeStruct((plan.accumulate, plan.batch, plan.length), jnp.int32)
    batch = Batch(tokens, tokens, tokens, jax.ShapeDtypeStruct(tokens.shape, jnp.bool_))
    key = jax.eval_shape(lambda: jax.random.key(0))
    args = base, trained, state, batch, key, jax.ShapeDtypeStruct((), jnp.int32)
    place = jax.sharding.SingleDeviceSharding(device)
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), args)
    form: dict[str, Any] = {"dtype": dtype, "remat": plan.remat, "effective": effective}
    step = partial(train_step, plan.config, optimizer, **form)
    options: Any = compiler_options(device.platform)
    return jax.jit(step, donate_argnums=(1, 2), compiler_options=options).lower(*args).compile()


def main() -> None:
    """Answer the request on standard input: {"peak": bytes} or {"error": text}, as JSON."""
    import jax

    from train.memory import KINDS, TrainingPlan

    request = json.load(sys.stdin)
    topology, adapter, kind = (request.pop(name) for name in ("topology", "adapter", "kind"))
    plan = TrainingPlan(
        config=GLMConfig.from_fields(request.pop("config")),
        precision=Precision(**request.pop("precision")),
        adapter=None if adapter is None else KINDS[kind](**adapter),
        **request,
    )
    absent = partial(compiler.absent_device, topology, plan.platform)
    device = jax.devices("cpu")[0] if topology is None else absent()
    try:
        print(json.dumps({"peak": peak_bytes(plan, device)}))
    except jax.errors.JaxRuntimeError as error:
        print(json.dumps({"error": str(error)}))


if __name__ == "__main__":
    main()

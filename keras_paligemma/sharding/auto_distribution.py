"""Choose a distribution for the available devices."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from keras import distribution

from keras_paligemma.planning import machines
from keras_paligemma.planning.job import Job
from keras_paligemma.planning.planner import ESTIMATE_SHARE
from keras_paligemma.planning.planner import GIB
from keras_paligemma.planning.training import Training
from keras_paligemma.sharding.layouts import Sharded
from keras_paligemma.sharding.layouts import distribute
from keras_paligemma.sharding.layouts import listed


def auto(
    preset: str,
    devices: Sequence[Any] | None = None,
    memory_gib: float | None = None,
    remat: str | None = "block",
    **job: Any,
) -> distribution.DataParallel | Sharded:
    """Choose a distribution: weights replicated if they fit, else sharded.

    Of the layouts that fit by an estimate, the one with the lowest bound of
    time is chosen. Replicated weights need not be gathered, so they come first,
    then the smallest group of chips that shares the weights. `keras-paligemma
    plan` asks the compiler instead.

    Args:
        preset: str, as `from_preset` takes it.
        devices: list of device names such as "tpu:0", or of JAX's devices; all
            if `None`.
        memory_gib: float, GiB per device; looked up for TPUs and GPUs if
            `None`.
        remat: `None`, "dots", "block" or "pair", the model's `remat`.
        **job: `batch_size`, `prompt_length`, `response_length`, `lora_rank`
            (0 trains all weights), `lora_targets`, `quantize`, `dtype`: see
            `planning.Job`.

    Returns:
        `keras.distribution.DataParallel` or `layouts.Sharded`.

    Raises:
        ValueError: no layout fits, or the memory is not known.

    Example:

    ```python
    keras.distribution.set_distribution(
        auto("pali_gemma2_pt_10b_448", batch_size=32)
    )
    ```
    """
    devices = listed(devices)
    if memory_gib is None:
        memory_gib = _memory(devices[0])
    training = Training(Job(preset, **job), (remat,))
    # A v5e's speeds stand for all devices: only the order of the layouts
    # depends on their ratios.
    machine = dataclasses.replace(
        machines.find("v5e-1"),
        name="here",
        chips=len(devices),
        memory=memory_gib,
        topology=None,
    )
    candidates = training.candidates(machine)
    for candidate in candidates:
        if _fits(training, candidate, machine):
            layout = candidate.layout
            shape = (layout.groups, layout.group)
            return distribute(layout.strategy, shape, devices)
    needs = {
        candidate.layout: sum(training.memory(candidate).values())
        for candidate in candidates
    }
    least = min(needs, key=lambda layout: needs[layout])
    raise ValueError(
        f"{preset!r} does not fit on {len(devices)} devices of "
        f"{memory_gib} GiB: {least}, which needs the least, needs about "
        f"{needs[least] / GIB:.1f} GiB on each. Expected: "
        f"{_nearest(training, machine)}"
        "quantize='int8' or 'int4', or adapters instead of all weights. "
        "`keras-paligemma plan` finds the smallest slice."
    )


def _fits(training, candidate, machine):
    """Return whether an estimate leaves enough memory for the compiler."""
    needed = sum(training.memory(candidate).values())
    return needed <= ESTIMATE_SHARE * machine.memory * GIB


def _nearest(training, machine):
    """Return the batch size, or else the device count, that would fit."""

    def fits(training, machine):
        return any(
            _fits(training, candidate, machine)
            for candidate in training.candidates(machine)
        )

    sizes = [2**i for i in range(16) if 2**i < training.job.batch_size]
    for size in reversed(sizes):
        job = dataclasses.replace(training.job, batch_size=size)
        if fits(Training(job, tuple(training.models)), machine):
            return f"a batch of {size}, "
    for times in (2, 4, 8, 16, 32):
        chips = machine.chips * times
        if fits(training, dataclasses.replace(machine, chips=chips)):
            return f"{chips} devices, "
    return ""


def _memory(device) -> float:
    """Return a device's memory in GiB, by its kind or from the device."""
    import jax

    if isinstance(device, str):
        device = _named(device)
    if device.device_kind in machines.MEMORY:
        return machines.MEMORY[device.device_kind]
    # Only local devices report their memory; all are of the same kind.
    here = jax.local_devices(backend=device.platform)[0]
    limit = (here.memory_stats() or {}).get("bytes_limit")
    if limit:
        return limit / GIB
    raise ValueError(
        "How much memory a device has is not known here. Received: "
        f"{device.device_kind!r}. Expected: memory_gib=16, say."
    )


def _named(name):
    """Return the JAX device of a name such as "tpu:0"."""
    import jax

    platform = name.partition(":")[0]
    for device in jax.devices(platform):
        if name in (platform, f"{platform}:{device.id}"):
            return device
    raise ValueError(
        f"There is no such device. Received: {name!r}. Expected: some of "
        f"{distribution.list_devices(platform)}."
    )

"""The device mesh, and the one table from logical axes to mesh axes.

The mesh is explicit and always set, on one device too, so that a CPU test runs the code that a pod runs.
"""

import json
import math
import os
import sys
import zlib

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import multihost

AXES = ("data", "fsdp", "tensor")
LONGEST_WAIT = 7 * 24 * 3600 * 1000  # milliseconds

RULES = {  # what an array axis is -> the mesh axes it is split over
    "rows": ("data", "fsdp"),  # batch rows, prompts, samples
    "embed": "fsdp",           # weights are stored split over fsdp and gathered where used
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
}


def make(data: int = 1, fsdp: int = -1, tensor: int = 1, *, devices=None) -> Mesh:
    """Make the (data, fsdp, tensor) mesh; one size may be -1, "all the devices that are left".

    Between the slices of a TPU lies the slow network: only the data axis goes over, whose gradients meet once
    a micro-batch. The tensor axis stays within a host, which feeds whole rows.
    """
    devices = jax.devices() if devices is None else devices
    shape = [data, fsdp, tensor]
    if any(size == 0 or size < -1 for size in shape) or shape.count(-1) > 1:
        raise ValueError(f"mesh: got {dict(zip(AXES, shape, strict=True))}, expected sizes >= 1 and at most one -1")
    if -1 in shape:
        shape[shape.index(-1)] = max(len(devices) // -math.prod(shape), 1)
    if math.prod(shape) != len(devices):
        raise ValueError(f"mesh: {dict(zip(AXES, shape, strict=True))} needs {math.prod(shape)} devices, there are "
                         f"{len(devices)}")
    slices = _num_slices(devices)
    if shape[0] % slices:
        raise ValueError(f"mesh: got data = {shape[0]} on {slices} slices, expected a multiple of {slices}: only the "
                         "data axis goes from slice to slice")
    within = (shape[0] // slices, *shape[1:])
    if slices > 1:
        placed = mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1), devices, allow_split_physical_axes=True)
    else:
        placed = mesh_utils.create_device_mesh(within, devices, allow_split_physical_axes=True)
    if not _feeds_whole_rows(placed):  # the order of the chips' torus gives way to that of the hosts
        placed = np.array(sorted(devices, key=_slice_host_id)).reshape(placed.shape)
    if not _feeds_whole_rows(placed):
        raise ValueError(f"mesh: got tensor = {shape[2]}, which does not divide the devices of a host; the tensor axis "
                         "has to stay within a host")
    return Mesh(placed, AXES, axis_types=(AxisType.Explicit,) * 3)


def _feeds_whole_rows(devices: np.ndarray) -> bool:
    """Whether the devices that share a row are of one host: of two, each would put rows of its own there."""
    hosts = np.vectorize(lambda device: device.process_index)(devices)
    return bool((hosts == hosts[..., :1]).all())


def _slice_host_id(device) -> tuple[int, int, int]:
    return getattr(device, "slice_index", 0), device.process_index, device.id


def _num_slices(devices) -> int:
    # A GPU's slice_index is its host, and fsdp may go over hosts: their devices come host by host.
    return len({getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"}) or 1


def spec(*axes: str | None) -> PartitionSpec:
    """Translate logical axes, e.g. spec("rows", None, "heads"); a name not in RULES is a KeyError."""
    return PartitionSpec(*(None if axis is None else RULES[axis] for axis in axes))


def sharding(*axes: str | None) -> NamedSharding:
    """`spec` on the mesh that is set."""
    return NamedSharding(jax.sharding.get_mesh(), spec(*axes))


# Within a shard_map, over what of the mesh is split: XLA copies what a collective over one device is given, on CPUs
# through another layout and back.


def whole(x, axis: int):
    """What all who share the weights' D have, side by side along an axis: all of D, or the rows of all."""
    return jax.lax.all_gather(x, RULES["embed"], axis=axis, tiled=True) if _is_split(RULES["embed"]) else x


def sum_over(axis: str, x):
    """Add up what the devices along a mesh axis have."""
    return jax.lax.psum(x, axis) if _is_split(axis) else x


def sum_over_rows(x):
    """Add up what all devices with rows have of an array [V D], each keeping its part of D."""
    if _is_split(RULES["embed"]):  # first, which leaves less for data
        x = jax.lax.psum_scatter(x, RULES["embed"], scatter_dimension=1, tiled=True)
    return sum_over("data", x)


def with_embed_split(x):
    """From own rows [R T D] to the rows of all who share the weights' D, and the own part of it."""
    return _exchange(x, split_axis=2, concat_axis=0)


def with_rows_split(x):
    """From the rows of all who share the weights' D, and the own part of it, to own rows [R T D]."""
    return _exchange(x, split_axis=0, concat_axis=2)


def _exchange(x, **axes: int):
    return jax.lax.all_to_all(x, RULES["embed"], **axes, tiled=True) if _is_split(RULES["embed"]) else x


def _is_split(axis: str) -> bool:
    return jax.lax.axis_size(axis) > 1


def platform() -> str:
    """What the mesh is made of: cpu, gpu or tpu; inside jit too, and for chips that are not here."""
    return jax.sharding.get_abstract_mesh().abstract_device.platform


def num_row_shards() -> int:
    """Over how many device groups the rows of a batch are split."""
    shape = jax.sharding.get_abstract_mesh().shape  # inside jit too
    return shape["data"] * shape["fsdp"]


def check_rows(rows_per_batch: int, accumulate: int) -> None:
    """Every micro-batch takes rows from every device."""
    shards = num_row_shards()
    if rows_per_batch < 1 or rows_per_batch % (shards * accumulate):
        raise ValueError(f"data.rows_per_batch: got {rows_per_batch}, expected a multiple of {shards * accumulate} = "
                         f"mesh.data x mesh.fsdp ({shards}) x compute.accumulate ({accumulate})")


def start_hosts() -> None:
    """Join the other hosts: under srun, on a TPU VM, or by JAX_COORDINATOR_ADDRESS, _NUM_PROCESSES and _PROCESS_ID."""
    jax.config.update("jax_enable_preemption_service", False)  # SIGTERM ends the process, until log.Termination
    is_tpu = any(os.path.exists(device) for device in ("/dev/accel0", "/dev/vfio/0"))
    is_srun = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1  # SLURM_NTASKS is set in a bare allocation too
    said = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}  # jax reads the address alone
    given = {name: os.environ[name] for name in ("JAX_COORDINATOR_ADDRESS", *said.values()) if name in os.environ}
    address = given.get("JAX_COORDINATOR_ADDRESS")
    if address or is_srun or is_tpu:
        if address:
            print(f"waiting for all hosts at {address}, 5 minutes at most", file=sys.stderr, flush=True)
        try:
            said = {key: int(given[name]) for key, name in said.items() if name in given}
            if is_srun and os.environ["SLURM_STEP_NUM_TASKS"] == os.environ["SLURM_STEP_NUM_NODES"]:
                # A process alone on its node drives all of its GPUs; jax would give it the first.
                said["local_device_ids"] = list(range(int(os.environ.get("SLURM_GPUS_ON_NODE", "1"))))
            jax.distributed.initialize(**said)
        except ValueError as error:
            raise ValueError(f"hosts: {error} Got {given}, expected an address, how many, and which from 0") from None
    elif not given.items() <= {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}.items():  # each would train alone
        raise ValueError(f"hosts: got {given}, expected JAX_COORDINATOR_ADDRESS=HOST:PORT of the first host beside it")


def check_same(what: str, value) -> None:
    """Refuse to go on if a value that goes into JSON is not the same on all hosts."""
    mine = zlib.crc32(json.dumps(value, sort_keys=True, default=str).encode())
    found = multihost_utils.process_allgather(np.uint32(mine))
    if len(set(np.ravel(found).tolist())) > 1:
        raise ValueError(f"hosts: {what} differ: the same command has to be started on all of them, on the same files")


def wait_for_hosts(what: str) -> None:
    """Wait until all hosts are here: the first one has written what the others are going to read.

    By the coordinator, which notices a host that died, and not by the devices, whose collectives give up while the
    first host works for an hour alone (on CPUs after 30 minutes).
    """
    multihost.get_barrier_sync_fn()(key=f"align_jax: {what}", timeout_ms=LONGEST_WAIT)

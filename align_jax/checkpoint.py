"""The train state and the place in the data, saved asynchronously by orbax; the last whole one is resumed."""

from collections.abc import Callable
from pathlib import Path

import jax
from orbax.checkpoint import v1 as ocp


class Checkpoints:
    """The checkpoints of one run: `with Checkpoints(folder) as ckpts`, whose end waits for a save under way.

    But not where the block ended by an error of which `gives_up` is true, as of a host that a save would wait for.
    """

    def __init__(self, folder: str | Path, *, keep: int = 2, gives_up: Callable = lambda error: False):
        self._gives_up = gives_up
        self.folder = Path(folder).absolute()
        self._orbax = ocp.training.Checkpointer(
            self.folder, cleanup_tmp_directories=True,
            preservation_policy=ocp.training.preservation_policies.LatestN(keep))

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace) -> None:
        if not self._gives_up(error):
            self._orbax.close()

    def save(self, step: int, state, place: dict) -> None:
        """Start saving; returns as soon as the arrays are copied off the devices."""
        self._orbax.save_async(step, state, custom_metadata={"place": place}, overwrite=True, force=True)

    def restore(self, like):
        """Return (step, state, place) of the newest whole checkpoint, sharded as `like`; None if there is none.

        The arrays of `like` are given up for those of the checkpoint: both at once would not fit.
        """
        latest = self._orbax.latest
        if latest is None:
            return None
        wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        for leaf in jax.tree.leaves(like):
            leaf.delete()
        state = self._orbax.load(latest.step, wanted)
        return latest.step, state, self._orbax.metadata(latest.step).custom_metadata["place"]

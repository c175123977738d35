"""Every test runs the sharded code: eight fake CPU devices, and fp32 products that are really fp32."""

import os

# The compiler takes most of the tests' time, and without what makes its programs fast a third of that; CI has it whole.
QUICK = os.environ.get("QUICK", "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 {QUICK}"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")

import contextlib  # noqa: E402

import jax  # noqa: E402
import pytest  # noqa: E402

from align_jax import mesh  # noqa: E402

jax.config.update("jax_default_matmul_precision", "highest")


@contextlib.contextmanager
def on_mesh(data: int, fsdp: int, tensor: int):
    """Set a mesh over the first data * fsdp * tensor fake devices."""
    with jax.set_mesh(mesh.make(data, fsdp, tensor, devices=jax.devices()[:data * fsdp * tensor])) as m:
        yield m


@pytest.fixture(params=[(1, 1, 1), (8, 1, 1), (2, 2, 2), (1, 4, 2)], ids=str)
def any_mesh(request):
    """Run the test once on every mesh."""
    with on_mesh(*request.param):
        yield request.param


@pytest.fixture
def one_device():
    with on_mesh(1, 1, 1):
        yield


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; CI runs it, tools/test.sh with -m \"\"")

"""For all tests: generated cases are the same in every run; `--hypothesis-profile=explore` draws new ones."""

import os
import shutil
import tempfile

# Tests compile far more than they compute; a GPU's kernels are to run as users compile them.
if shutil.which("nvidia-smi") is None:
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=0 {flags}"

# An interpreted warpgroup holds a thread of XLA's pool while it waits for another one: with
# a thread a core they can starve each other, and the test hangs.
os.environ.setdefault("PJRT_NPROC", "32")

# Many tests start the same programs in processes of their own; what one has compiled, the others load.
compiled = None
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    compiled = tempfile.mkdtemp(prefix="bsa-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "1"

import jax
import pytest
from hypothesis import HealthCheck, Phase, settings

# No shrinking: every new shape compiles for seconds.
COMMON = {
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "phases": [Phase.explicit, Phase.reuse, Phase.generate],
}
settings.register_profile("same", derandomize=True, **COMMON)
settings.register_profile("explore", print_blob=True, **COMMON)
settings.load_profile("same")


@pytest.fixture(autouse=True, scope="module")
def free_compiled_code():
    """Each program that XLA compiled keeps memory maps; thousands of them in one process crash it."""
    yield
    jax.clear_caches()


def pytest_unconfigure():
    """The first process, whose directory the others share, removes it."""
    if compiled:
        shutil.rmtree(compiled, ignore_errors=True)

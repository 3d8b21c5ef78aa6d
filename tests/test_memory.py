"""What a program's temporaries cost the system."""
import platform
import subprocess
import sys

import pytest

CALLS = """
import resource
import jax, jax.numpy as jnp
from instaflow_jax.infra import memory
{first}
x = jnp.ones((2**16, 8))
program = jax.jit(lambda x: x @ x[:256].T @ x[:256])  # what is between the products is 64 MiB
for call in range(60):
    if call == 40:  # until then the heap may grow
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    jax.block_until_ready(program(x))
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(first: str) -> int:
    """Pages of 4 KiB that the system handed out during twenty calls."""
    done = subprocess.run([sys.executable, "-c", CALLS.format(first=first)], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_temporaries_are_kept_between_calls():
    assert faults("memory.keep()") < faults("") / 3

"""A plugin that holds the laws on the simulated device, in the place of CUDA.

``python -m pytest -p tests.devices.simulate -m cuda -k sim tests/laws/test_normalisation.py``, and in the same way
``test_boundaries``, ``test_coupled``, ``test_dropout``, ``test_heads`` and ``test_lengths``. A device cannot be
unregistered, so this is not part of the suite. The other files ask for more than the device has: sparse tensors,
recurrent kernels, functions of CUDA, and errors that a hook raises in backward. A device of Python cannot pass them on.
"""

import os

from tests.devices.simulated_device import Full, install


def pytest_configure() -> None:
    """Register the device, where this module is a plugin."""
    os.environ["MICROBATCH_TEST_ACCELERATOR"] = "sim"
    install(Full)

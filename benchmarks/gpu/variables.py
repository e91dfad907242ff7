"""Names of the environment variables by which the tests' processes know where results go."""

LOG, ITEM = "MICROBATCH_GPU_LOG", "MICROBATCH_GPU_ITEM"

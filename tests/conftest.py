"""Settings of the whole suite."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

from hypothesis import settings  # noqa: E402

# A first call may import or build tables; how long an example takes says nothing about whether it is right.
settings.register_profile("foleyscale", deadline=None)
settings.load_profile("foleyscale")

"""One thread for the parent too: torch's thread pool and busy ranks on the same cores slow each other by a hundred."""

import os

from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")

# A deadline measures the machine's load, not the code.
settings.register_profile("without deadlines", deadline=None)
settings.load_profile("without deadlines")

"""One thread for the parent too: torch's thread pool and busy ranks on the same cores slow each other by a hundred."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

"""Tests use one thread: their matrices are small, and two threads on a busy machine mostly wait."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; child processes inherit it

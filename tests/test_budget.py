"""`--memory` as a promise: whatever the budget, the same bytes and a peak that keeps to it.

The authority is the kernel's own count of what was resident, in a process of its own (budgets.py).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from calibrate.plan import UNCOUNTED

from .budgets import Took

BUDGETS = 20


def test_twenty_budgets_give_the_same_bytes_and_are_kept_to(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.budgets", str(tmp_path), str(BUDGETS)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    runs = [Took(**one) for one in json.loads(printed)]
    assert len(runs) == BUDGETS
    assert all(run.files == runs[0].files for run in runs)
    assert len(runs[0].files) > 2
    for run in runs:
        assert run.peak <= run.budget + UNCOUNTED, run
    # the range means something: everything in files at its start, and nothing at its end
    assert runs[0].spilled > 2 * UNCOUNTED > 0 == runs[-1].spilled
    assert runs[0].peak < runs[-1].peak - UNCOUNTED

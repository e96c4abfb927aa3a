"""A policy: which figures of a report are limited, and by how much. Read from TOML.

    min_tokens = 4096                   # fewer are not enough to decide
    [likelihood.kl_mean]
    max = 0.05                          # the figure itself
    baseline_ratio = 1.1                # times the baseline's figure
    [retrieval.tasks.difference.cwe]
    min = -0.1                          # one task has a limit of its own

Unknown figures and keys are refused with the nearest known one. Knows nothing of reports.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from importlib import resources
from pathlib import Path
from typing import Any

from llama4q.errors import UserError
from llama4q.recipe import nearest

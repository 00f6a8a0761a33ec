"""The stored logits are still what transformers computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.oracle import golden


@pytest.mark.parametrize("case", golden.CASES)
def test_the_stored_logits_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    np.testing.assert_allclose(golden.read(case), golden.compute(case, tmp_path), atol=1e-5)

"""What the benchmark of training steps refuses."""

import pytest

from benchmarks.train import check
from longrope2.errors import ConfigError


def test_what_cannot_be_shared_evenly_is_refused() -> None:
    check(4096, 4, 2)
    check(4096, 2, 1)
    with pytest.raises(ConfigError) as raised:
        check(100, 3, 2)
    assert raised.value.faults == (
        "--length 100 and --sequence 2: 16 documents and 4 heads must divide evenly",
        "--ranks 3: groups of 2 must share 14 long and 6 short segments evenly",
    )
    with pytest.raises(
        ConfigError, match="--length 16, --ranks 2 and --sequence 0 must be at least 1"
    ):
        check(16, 2, 0)

"""The short form of the fuzzer: mutations that a seed gives, so that every run of the suite tries the same."""

import random
from collections import Counter
from pathlib import Path

from tests.fuzz.checkpoints import Attempt, mutated


def test_mutated_checkpoints_are_refused_or_read(tmp_path: Path) -> None:
    """Whatever is changed, the answer is a state or an error of fnlight's; a step from such a state may fail, but not crash."""
    attempt, draw = Attempt(tmp_path), random.Random(1)
    corpus = attempt.corpus()
    ends = Counter(attempt(bytes([data[0] | 64]) + data[1:]) for data in (mutated(draw.choice(corpus), draw) for _ in range(600)))
    assert sum(ends.values()) == 600
    assert ends["BrokenCheckpointError"] > 100


def test_the_corpus_itself_is_read(tmp_path: Path) -> None:
    """What the mutations begin with is sound, so that they reach the depth of the readers."""
    attempt = Attempt(tmp_path)
    assert {attempt(data) for data in attempt.corpus()} == {"read"}

from __future__ import annotations

import pytest

from dsc_split.engines import Target
from dsc_split.errors import UsageError


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("onnxruntime", "onnxruntime:cpu"),
        ("onnxruntime:cuda", "onnxruntime:cuda"),
        ("onnxruntime:cpu, slowdown=6.0 , threads=1", "onnxruntime:cpu,threads=1,slowdown=6"),
        ("onnxruntime,slowdown=1", "onnxruntime:cpu"),
        ("onnxruntime,slowdown=2.25", "onnxruntime:cpu,slowdown=2.25"),
    ],
)
def test_canonical_text_names_the_architecture_and_orders_the_options(text: str, canonical: str) -> None:
    target = Target.parse(text)

    assert str(target) == canonical
    assert Target.parse(str(target)) == target


def test_options_are_numbers() -> None:
    target = Target.parse("onnxruntime:cpu,threads=3,slowdown=1.5")

    assert (target.threads, target.slowdown) == (3, 1.5)
    assert (Target.parse("onnxruntime").threads, Target.parse("onnxruntime").slowdown) == (None, 1.0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("onxruntime:cpu", "unknown back-end 'onxruntime'. Did you mean 'onnxruntime'"),
        ("", "unknown back-end ''"),
        ("onnxruntime:", "no architecture ''"),
        ("onnxruntime:cudo", "no architecture 'cudo'. Did you mean 'cuda'"),
        ("onnxruntime:cpu,thread=1", "no option 'thread'. Did you mean 'threads'"),
        ("onnxruntime:cpu,threads", "'threads' is ''; a whole number"),
        ("onnxruntime:cpu,threads=0", "'threads' is '0'"),
        ("onnxruntime:cpu,threads=1.5", "'threads' is '1.5'"),
        ("onnxruntime:cpu,threads=1,threads=2", "given twice"),
        ("onnxruntime:cpu,slowdown=0.5", "'slowdown' is '0.5'; a number from 1"),
        ("onnxruntime:cpu,slowdown=inf", "'slowdown' is 'inf'"),
        ("onnxruntime:cpu,slowdown=nan", "'slowdown' is 'nan'"),
        ("onnxruntime:cpu,", "no option ''"),
    ],
)
def test_what_is_wrong_with_a_target_is_named(text: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        Target.parse(text)

    assert words in str(caught.value)

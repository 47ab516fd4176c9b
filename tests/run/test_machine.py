"""What is known of the machine, and what is said of it."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from slipstream.run import machine, training
from slipstream.run.presets import configure
from slipstream.run.training import Training


@pytest.mark.parametrize(
    ("text", "name", "bfloat16"),
    [
        ("model name\t: Xeon 8481C\nflags\t\t: fpu avx512f avx512_bf16 amx_bf16\n", "Xeon 8481C", True),
        ("model name\t: EPYC\nflags\t\t: fpu avx2\n\nmodel name\t: other\n", "EPYC", False),
        ("Features\t: fp asimd bf16\n", None, True),
        ("", None, True),
    ],
)
def test_processors_are_read_from_what_linux_says(
    text: str, name: str | None, bfloat16: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(machine, "_INFORMATION", tmp_path / "cpuinfo")
    assert machine.computes_bfloat16() == bfloat16
    assert machine.processor() == name if name else machine.processor()


@pytest.mark.parametrize("has_it", [True, False])
def test_bfloat16_in_software_is_warned_of(has_it: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "computes_bfloat16", lambda: has_it)
    config = configure("ppo", "toy:catch", {"net.precision": "bfloat16", "placement.device": "cpu"})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        Training(config).close()
    assert [str(warning.message).partition(" is")[0] for warning in said] == ["net.precision=bfloat16"] * (not has_it)

"""What is known of the machine, and what is said of it."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from slipstream.run import machine, training
from slipstream.run.presets import configure
from slipstream.run.training import Training

INTEL, AMD = "vendor_id\t: GenuineIntel\n", "vendor_id\t: AuthenticAMD\n"


@pytest.mark.parametrize(
    ("text", "name", "bfloat16"),
    [
        (f"{INTEL}model name\t: Xeon 8481C\nflags\t\t: fpu avx512f avx512_bf16 amx_bf16\n", "Xeon 8481C", True),
        (f"{INTEL}model name\t: Xeon\nflags\t\t: fpu avx512f avx512_bf16\n", "Xeon", False),
        (f"{AMD}model name\t: EPYC\nflags\t\t: fpu avx512f avx512_bf16\n", "EPYC", True),
        (f"{AMD}model name\t: EPYC\nflags\t\t: fpu avx2\n\nmodel name\t: other\n", "EPYC", False),
        ("Features\t: fp asimd bf16\n", None, True),
        ("Features\t: fp asimd\n", None, False),
        ("", None, None),
    ],
)
def test_processors_are_read_from_what_linux_says(
    text: str, name: str | None, bfloat16: bool | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(machine, "_INFORMATION", tmp_path / "cpuinfo")
    assert machine.gains_by_bfloat16() is bfloat16
    assert machine.processor() == name if name else machine.processor()


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, None),
        ({"meminfo": 9}, 9),
        ({"meminfo": 9, "max": 8, "current": 5}, 3),
        ({"meminfo": 9, "max": 8, "current": 5, "inactive_file": 2}, 5),
        ({"meminfo": 4, "max": 8, "current": 5, "inactive_file": 2}, 4),
        ({"meminfo": 9, "max": None, "current": 5, "inactive_file": 2}, 9),
    ],
)
def test_memory_that_is_left_is_that_of_machine_and_group_with_cached_files(
    files: dict[str, int | None], free: int | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In MiB; the pages that a group keeps of files it has read make room when somebody wants it."""
    monkeypatch.setattr(machine, "_MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(machine, "_GROUP", tmp_path)
    size = {name: 2**20 * (value or 0) for name, value in files.items()}
    if "meminfo" in files:
        (tmp_path / "meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable: {size['meminfo'] // 1024} kB\n")
    if "max" in files:
        (tmp_path / "memory.max").write_text("max\n" if files["max"] is None else f"{size['max']}\n")
        (tmp_path / "memory.current").write_text(f"{size['current']}\n")
    if "inactive_file" in files:
        stat = f"anon 1\nfile 7\ninactive_anon 3\ninactive_file {size['inactive_file']}\nactive_file 11\n"
        (tmp_path / "memory.stat").write_text(stat)
    assert machine.available_memory() == (None if free is None else free * 2**20)


@pytest.mark.parametrize(
    ("text", "precision"),
    [
        ("vendor_id : AuthenticAMD\nflags : fpu avx2 avx512_bf16", "bfloat16"),
        ("vendor_id : GenuineIntel\nflags : fpu avx2 avx512_bf16", "float32"),
        ("Features : fp asimd bf16", "bfloat16"),
        ("flags : fpu avx2", "float32"),
        (None, "float32"),
    ],
)
def test_auto_is_what_the_processor_is_known_to_be_faster_with_and_is_written_down(
    text: str | None, precision: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(machine, "_INFORMATION", tmp_path / "cpuinfo")
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text + "\n")
    changes = {"net.precision": "auto", "placement.device": "cpu"}
    assert configure("ppo", "toy:catch", changes).net.precision == precision
    assert configure("ppo", "ALE/Pong-v5", changes).net.precision == precision


@pytest.mark.parametrize("gains", [True, False, None])
def test_bfloat16_that_is_slower_than_float32_is_warned_of(gains: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "gains_by_bfloat16", lambda: gains)
    config = configure("ppo", "toy:catch", {"net.precision": "bfloat16", "placement.device": "cpu"})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        Training(config).close()
    of = [str(warning.message).partition(" is")[0] for warning in said]
    assert of == ["net.precision=bfloat16"] * (gains is False)


BUSY = "import time\nwhile time.process_time() < 0.3: pass\nprint(flush=True)\ninput()"
PARENT = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {BUSY!r}], stdin=0)"


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="only Linux tells of processes that still run")
@pytest.mark.parametrize("program", [BUSY, PARENT], ids=["child", "grandchild"])
def test_the_time_of_processes_that_still_run_counts_and_is_kept_when_they_end(program: str) -> None:
    before = machine.cpu_seconds()
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        running = machine.cpu_seconds() - before
        child.communicate(b"\n")
    assert running >= 0.25
    assert machine.cpu_seconds() - before >= running

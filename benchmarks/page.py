"""The page of plots: docs/benchmarks.md and its pictures, made of the results that are committed.

    python benchmarks/page.py

Every result in benchmarks/results has a section, with the command, the commit and the machine that it comes from; one
that nobody has told this program how to draw has those alone. Learning curves are shown as they are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
PAGE = ROOT / "docs/benchmarks.md"
PICTURES = ROOT / "docs/benchmarks"

Result = Mapping[str, Any]

_HEAD = """# Benchmarks

Made by `python benchmarks/page.py` of the results in [benchmarks/results](../benchmarks/results). Machines are shared
and differ from section to section: compare within one.
"""


class Section(NamedTuple):
    """What the page says of one file of results.

    Attributes:
        file: Its name.
        title: Heading.
        text: What was measured.
        draw: Draws it.
    """

    file: str
    title: str
    text: str
    draw: Callable[[Result], Figure] | None = None


def beside(count: int, height: float = 3.5) -> tuple[Figure, Sequence[Axes]]:
    """A picture of so many plots, side by side."""
    figure, axes = plt.subplots(1, count, figsize=(5.5 * count, height), layout="constrained", squeeze=False)
    return figure, axes[0]


def bars(axes: Axes, values: Mapping[str, float], label: str, limits: Mapping[str, float] | None = None) -> None:
    """Horizontal bars from the top down; a mark where a limit is."""
    names = list(values)
    axes.barh(names, list(values.values()), color="C0")
    for place, name in enumerate(names):
        axes.text(0.0, place, f" {_shown(values[name])}", va="center", color="white", fontsize=9)
        if limits:
            axes.plot([limits[name]] * 2, [place - 0.4, place + 0.4], color="C3", linewidth=2)
    axes.invert_yaxis()
    axes.set_xlim(left=0.0)
    axes.set_xlabel(label + (", and the limit (red)" if limits else ""))


def _shown(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def stacked(axes: Axes, parts: Mapping[str, Mapping[str, float]], label: str) -> None:
    """A horizontal bar per name, of parts."""
    names, begun = list(parts), [0.0] * len(parts)
    for part in dict.fromkeys(part for each in parts.values() for part in each):
        values = [parts[name].get(part, 0.0) for name in names]
        axes.barh(names, values, left=begun, label=part)
        begun = [left + value for left, value in zip(begun, values, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=3)


def bench(result: Result) -> Figure:
    """Speeds of `slipstream bench`, what a step costs, start-up and memory."""
    process = {algo: row for algo, row in result["process"].items() if row}
    held = {algo: row["peak_mb"] for algo, row in process.items() if "peak_mb" in row}  # older results have none
    figure, (speed, cost, start, *more) = beside(3 + bool(held), 1.6 + 0.35 * max(4, len(result["variants"])))
    variants = {name.removesuffix(" default"): row for name, row in result["variants"].items()}
    limits = {name: row["limit"] for name, row in variants.items()}
    bars(speed, {name: row["steps_per_second"] for name, row in variants.items()}, "steps per second", limits)
    kinds = {"environment": "env", "inference": "infer", "gradient": "learn"}
    parts = {
        algo: {kind: 1e3 * stages[f"limit/{name}_seconds_per_step"] for kind, name in kinds.items()}
        for algo, stages in result["stages"].items()
    }
    stacked(cost, parts, "CPU milliseconds per step, each stage alone")
    bars(start, {algo: row["startup_seconds"] for algo, row in process.items()}, "seconds to the first 1,000 steps")
    for memory in more:
        bars(memory, held, "peak memory, MB")
    return figure


def hot_loop(result: Result) -> Figure:
    """Milliseconds of the layers of a gradient by precision, and of what comes after it."""
    figure, (layers, step) = beside(2)
    found = result["layers_milliseconds"]
    parts: dict[str, dict[str, float]] = {
        precision: {layer: times.get("forward and backward", times["forward"]) for layer, times in each.items()}
        for precision, each in found.items()
    }
    stacked(layers, parts, f"ms, {result['rows']} rows forward and backward")
    bars(step, result["step_milliseconds"], "ms per minibatch")
    return figure


def acting(result: Result) -> Figure:
    """Rows per second of collecting, and of its least."""
    figure, (axes,) = beside(1, 2.0)
    bars(axes, result["steps_per_second"], "rows per second")
    return figure


def cluster(result: Result) -> Figure:
    """Steps per second of collectors in processes and in actors on two nodes."""
    figure, (axes,) = beside(1)
    bars(axes, {name: row["steps_per_second"] for name, row in result["medians"].items()}, "steps per second")
    return figure


def plan(result: Result) -> Figure:
    """The model at scale, beside runs."""
    figure, (speed, lag) = beside(2)
    actors = [row["actors"] for row in result["rows"]]
    for axes, said, measured in ((speed, "predicted", "steps_per_second"), (lag, "predicted_lag", "lag")):
        axes.plot(actors, [row[said] for row in result["rows"]], "--o", label="predicted")
        axes.plot(actors, [row[measured] for row in result["rows"]], "-o", label="measured")
        axes.set_xlabel("actors")
        axes.set_ylabel(measured.replace("_", " "))
        axes.legend()
    return figure


def scale(result: Result) -> Figure:
    """Speed by cores, and what the limit says of it."""
    schedules = list(dict.fromkeys(row["schedule"] for row in result["rows"]))
    figure, plots = beside(len(schedules))
    for axes, schedule in zip(plots, schedules, strict=True):
        rows = [row for row in result["rows"] if row["schedule"] == schedule]
        for number, row in enumerate(rows):
            counts = [int(count) for count in row["steps_per_second"]]
            name = f"{row['num_envs']} environments, {row['lanes']} lanes"
            axes.plot(counts, list(row["steps_per_second"].values()), "-o", color=f"C{number}", label=name)
            axes.plot(counts, list(row["predicted"].values()), "--", color=f"C{number}")
        axes.set(title=schedule, xlabel="cores", ylabel="steps per second (dashed: predicted)")
        axes.legend(fontsize=8)
    return figure


def peers(result: Result) -> Figure:
    """Speed of each contestant of each group."""
    figure, plots = beside(len(result["groups"]), 4.0)
    for axes, (name, group) in zip(plots, result["groups"].items(), strict=True):
        medians = group["medians"].items()
        bars(axes, {who: row["steps_per_s"] for who, row in medians if row["steps_per_s"]}, "steps per second")
        axes.set_title(name)
    return figure


def sampling(result: Result) -> Figure:
    """Microseconds of a prioritised draw."""
    figure, plots = beside(2)
    for axes, part in zip(plots, ("sampling", "with_observations"), strict=True):
        bars(axes, result[part]["microseconds"], f"microseconds, {part.replace('_', ' ')}")
    return figure


def chaos(result: Result) -> Figure:
    """Kills by run."""
    figure, (axes,) = beside(1)
    bars(axes, {name: case["kills"] for name, case in result["cases"].items()}, "kills")
    for place, case in enumerate(result["cases"].values()):
        if not case["identical"]:
            axes.patches[place].set_color("C3")
    return figure


def noticing(result: Result) -> Figure:
    """Seconds by fault."""
    figure, (axes,) = beside(1, height=1.8)
    bars(axes, {fault: told["median"] for fault, told in result["seconds"].items()}, "seconds, medians")
    return figure


def soak(result: Result) -> Figure:
    """Memory and speed over time."""
    figure, plots = beside(2)
    samples = result["samples"]
    minutes = [each["seconds"] / 60.0 for each in samples]
    plots[0].plot(minutes, [each["megabytes"] for each in samples])
    plots[0].set_ylabel("MB of all processes")
    plots[0].set_ylim(bottom=0.0)
    plots[1].plot(minutes, [each["steps"] for each in samples])
    plots[1].set_ylabel("steps")
    for axes in plots:
        axes.set_xlabel("minutes")
    return figure


_SCHEDULES = (
    "Steps per second by schedule and placement, beside the limit: cores over the CPU time of a step's stages, each "
    "alone. Medians of rounds in turn."
)
_LEARNERS = "Two learners in processes of one machine beside one whose shards are threads."

SECTIONS: Sequence[Section] = (
    Section("bench.json", "Schedules on Pong", _SCHEDULES, bench),
    Section("bench_wide.json", "Schedules on Pong, 64 environments", _SCHEDULES, bench),
    Section("peers.json", "Beside other libraries", "The same work in turn, by `benchmarks/peers/compare.py`.", peers),
    Section("scale.json", "Cores, lanes and environments", "Measured, and as `slipstream doctor` predicts.", scale),
    Section(
        "hot_loop.json",
        "The hot loop",
        "One thread; what was changed and what it brought is in docs/profile.md.",
        hot_loop,
    ),
    Section("acting.json", "Collecting CartPole", "64 environments, beside environments and bare forwards.", acting),
    Section(
        "waiting.json",
        "Waiting for environments",
        "The share that synchronous collection waits, and what training gains.",
    ),
    Section("bench_ray.json", "Ray actors on one machine", "Collectors in processes beside actors.", bench),
    Section("cluster.json", "Two Ray nodes", "Collectors in actors of two nodes on one machine.", cluster),
    Section("bench_learners.json", "Two learners, PPO", _LEARNERS, bench),
    Section("bench_learners_dqn.json", "Two learners, DQN", _LEARNERS, bench),
    Section("plan.json", "The model at scale", "What `slipstream doctor --plan` says, beside runs.", plan),
    Section(
        "replay_sampling.json", "Prioritised draws", "512 out of a million, beside other packages in turn.", sampling
    ),
    Section("replay_memory.json", "A million Atari steps", "Bytes that a replay was announced to take, and took."),
    Section("verify.json", "The same bits", "Configurations, in placements and with delays of all kinds."),
    Section(
        "chaos.json",
        "Killed and resumed",
        "Runs that were killed with SIGKILL at random moments and resumed, until they ended. Red is what differed from "
        "runs that were left alone.",
        chaos,
    ),
    Section("noticing.json", "Workers that die or hang", "Seconds until that is noticed.", noticing),
    Section("soak.json", "Faults every 200 rows", "Crashes, kills and hangs in turn, in two worker processes.", soak),
    Section(
        "under_fire.json",
        "Learning under fire",
        "CartPole with a crash, a hang or NaN every 2,000 steps, beside CartPole that is left alone.",
    ),
    Section(
        "checkpoint_cost.json",
        "What checkpoints and checks cost",
        "PPO on Pong with many checkpoints and without any, in turn; shares of the time.",
    ),
)


def origins(result: Result) -> Iterator[str]:
    """Command, commit and machine of each part of a result that says so."""
    if "command" in result:
        machine, changed = result["machine"], " with changes" * bool(result.get("dirty"))
        commit = f", commit {result['commit'][:7]}{changed}" if result.get("commit") else ""
        yield f"`{result['command']}`: {machine['processor']}, {machine['cores']} cores{commit}."
        return
    for part in result.values():
        if isinstance(part, Mapping):
            yield from origins(part)


def digest(section: Section) -> str:
    """Of the numbers that a picture is drawn of; the picture carries it."""
    return hashlib.sha256((RESULTS / section.file).read_bytes()).hexdigest()


def facts(result: Result) -> str:
    """Plain numbers at the top of a result that nobody draws."""
    plain = {name: value for name, value in result.items() if isinstance(value, int | float) and name != "dirty"}
    return ", ".join(f"{name.replace('_', ' ')} {value:,.6g}" for name, value in plain.items())


def sections() -> Iterator[tuple[Section, Result]]:
    """Those whose files are there, and then the files that have none."""
    for section in SECTIONS:
        if (RESULTS / section.file).exists():
            yield section, json.loads((RESULTS / section.file).read_text())
    known = {section.file for section in SECTIONS}
    for file in sorted(RESULTS.glob("*.json")):
        if file.name not in known:
            yield Section(file.name, file.stem.replace("_", " "), ""), json.loads(file.read_text())


def page() -> str:
    """The page."""
    lines = [_HEAD]
    for section, result in sections():
        own = RESULTS / Path(section.file).with_suffix(".png")
        picture = f"benchmarks/{own.name}" if section.draw else f"../benchmarks/results/{own.name}"
        lines += [f"## {section.title}\n"]
        lines += [f"{section.text}\n"] * bool(section.text)
        if section.draw or own.exists():
            lines += [f"![{section.title}]({picture})\n"]
        elif told := facts(result):
            lines += [f"{told[0].upper()}{told[1:]}.\n"]
        first, *others = origins(result)
        more = [f"And {len(others)} more like it."] * bool(others)
        lines += [f"[{section.file}](../benchmarks/results/{section.file}). {' '.join([first, *more])}\n"]
    lines += ["## Learning curves\n"]
    for file in sorted((RESULTS / "learning").glob("*.json")):
        if file.with_suffix(".png").exists():
            lines += [f"### {file.stem}\n", f"![{file.stem}](../benchmarks/results/learning/{file.stem}.png)\n"]
    return "\n".join(lines)


def main() -> None:
    PICTURES.mkdir(exist_ok=True)
    for section, result in sections():
        if section.draw:
            figure = section.draw(result)
            picture = PICTURES / Path(section.file).with_suffix(".png").name
            figure.savefig(picture, dpi=80, metadata={"Source": digest(section)})
            plt.close(figure)
    PAGE.write_text(page())


if __name__ == "__main__":
    main()

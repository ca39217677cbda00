"""``make manifests``: what is committed of rendered manifests, each as ``facemae submit ... --dry-run`` prints it.

Run from the repository's root. Edit the settings, never the rendered files.
"""

from __future__ import annotations

import contextlib
import io
import shlex
from dataclasses import dataclass
from pathlib import Path

from jobs.submit import SubmitConfig, run

REPOSITORY = Path(__file__).parents[2]
FOLDER = Path("infra/kubernetes")
IMAGE = "registry.example.org/facemae:0.1.0"
PAGE = Path("docs/cluster.md")
BEGIN, END = "<!-- quick start: begin -->", "<!-- quick start: end -->"
OVERLAYS = {"cpu": 24, "gpu": 240, "spot": 240, "large": 240}
"""Hours after which a run of the preset is stopped."""
JOBS = {
    "ingest": "cpu",
    "pretrain": "gpu",
    "embed": "gpu",
    "train": "gpu",
    "protect": "gpu",
    "leakage": "gpu",
    "report": "cpu",
    "verify": "cpu",
    "evaluate": "cpu",
    "pipeline": "gpu",
}
"""The preset of each job."""


@dataclass(frozen=True)
class Rendering:
    """One rendered file.

    Attributes:
        path: below the repository's root.
        submission: what renders it.
    """

    path: Path
    submission: SubmitConfig

    @property
    def command(self) -> str:
        """The command line that prints the same."""
        asked = self.submission
        given = ["submit", asked.job, "--config", asked.config, "--to", asked.to, "--image", str(asked.image), "--preset", asked.preset]
        given += ["--name", str(asked.name), "--priority-class", str(asked.priority_class)]
        given += ["--deadline-hours", f"{asked.deadline_hours:g}", "--dry-run"]
        return shlex.join(["facemae", *given])

    def text(self) -> str:
        """The manifests."""
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
            run(self.submission)
        return f"# {self.command}\n{printed.getvalue()}"


def renderings() -> list[Rendering]:
    """All of them."""
    found = [
        _rendering(FOLDER / "overlays" / preset / "rayjob.yaml", "pipeline", f"overlays/{preset}/job.yaml", preset, preset, hours)
        for preset, hours in OVERLAYS.items()
    ]
    found += [
        _rendering(FOLDER / "jobs" / f"{job}.yaml", job, f"jobs/settings/{job}.yaml", preset, job, 240) for job, preset in JOBS.items()
    ]
    return found


def page(text: str) -> str:
    """The quick start's page, with its manifests in place."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    block = "".join(f"    {line}".rstrip() + "\n" for line in renderings()[0].text().splitlines()[1:])
    return f"{before}{BEGIN}\n\n{block}\n{END}{after}"


def _rendering(path: Path, job: str, settings: str, preset: str, name: str, hours: float) -> Rendering:
    submission = SubmitConfig(
        job=job,
        config=str(FOLDER / settings),
        to="kubernetes",
        image=IMAGE,
        preset=preset,  # type: ignore[arg-type]
        name=f"facemae-{name}",
        priority_class="facemae",
        deadline_hours=hours,
        dry_run=True,
    )
    return Rendering(path, submission)


def main() -> None:
    """Write them all."""
    for rendering in renderings():
        (REPOSITORY / rendering.path).write_text(rendering.text(), encoding="utf-8")
        print(rendering.path)
    (REPOSITORY / PAGE).write_text(page((REPOSITORY / PAGE).read_text(encoding="utf-8")), encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()

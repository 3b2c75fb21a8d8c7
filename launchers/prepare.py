"""What a run directory gets before its job is submitted: configuration, code revision with changes, and the scripts."""

from __future__ import annotations

import logging
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from hmar_mega.errors import UserError
from hmar_mega.files import write_atomic

if TYPE_CHECKING:
    from hmar_mega.config import Config

log = logging.getLogger(__name__)

#: Of a run directory: what `hmar-mega launch` writes and its jobs add to.
LAUNCH_FOLDER = "launch"

#: Run directory of a sweep's cell, in the cell's folder, which has the name.
CELL_RUN = "run"

#: Of the launch folder.
CONFIG_FILE, JOB_FILE, EVENTS_FILE = "config.yaml", "job.sbatch", "events.jsonl"

#: How often a job starts again, unless said otherwise.
MAX_RESTARTS = 50

#: Read by every job script.
COMMON = ("await.sh", "job.sh", "task.sh")


def templates() -> Path:
    """The folder of the job scripts as they are packaged."""
    return Path(str(resources.files("hmar_mega.launchers"))) / "templates"


def prepare(config: Config, files: Mapping[str, str], command: Sequence[str]) -> Path:
    """Write RUN/launch: the full configuration, and what `prepare_scripts` writes.

    Returns:
        The folder.

    Raises:
        UserError: when it cannot be written, or `settle_start` refuses.
    """
    from hmar_mega.config_io import config_to_yaml

    config = settle_start(config)
    folder = Path(str(config.run.dir)) / LAUNCH_FOLDER
    prepare_scripts(folder, {CONFIG_FILE: config_to_yaml(config), **files}, command)
    for name in ("logs", "statuses"):
        (folder / name).mkdir(exist_ok=True)
    return folder


def prepare_scripts(folder: Path, files: Mapping[str, str], command: Sequence[str]) -> None:
    """Write the command, the revision of the code with its changes, what job scripts read, and `files`.

    Args:
        files: further files by name, such as the job script.
        command: the command line that asked for it.

    Raises:
        UserError: when it cannot be written.
    """
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    described, changes = _revision()
    written = {
        "command.txt": f"# {now}, in {Path.cwd()}\n{shlex.join(command)}\n",
        "revision.txt": described + "\n",
        "changes.diff": changes,
        **{name: (templates() / name).read_text(encoding="utf-8") for name in COMMON},
        **files,
    }
    for name, text in written.items():
        write_atomic(folder / name, text)


def settle_start(config: Config) -> Config:
    """Where the run starts, said once and not at every restart: without `run.resume_from` and `run.resume=false`.

    The checkpoint of `run.resume_from` becomes the latest one; a job that starts again goes on from what it has saved
    since. The next save removes those that came after it, as without a job.

    Raises:
        UserError: when there is no such checkpoint, or there are some and `run.resume` is false.
    """
    run = Path(str(config.run.dir))
    folder, name = run / "checkpoints", config.run.resume_from
    if not config.run.resume and any(folder.glob("step-*/state.json")):
        raise UserError(f"run.dir={run} already has checkpoints and run.resume=false; choose another run.dir")
    if name is not None:
        if (folder / name).is_file():  # `best`
            name = (folder / name).read_text(encoding="utf-8").strip()
        if not (folder / name / "state.json").is_file():
            raise UserError(
                f"run.resume_from={config.run.resume_from}: {run} has no such complete checkpoint; "
                f"`hmar-mega checkpoint list {run}` shows those that it has"
            )
        write_atomic(folder / "latest", name + "\n")
        log.info("%s is the latest checkpoint of %s now: the run goes on from it", name, run)
    section = config.run.model_copy(update={"resume": True, "resume_from": None})
    return config.model_copy(update={"run": section})


def launch_config(config: Config) -> Config:
    """The configuration with an absolute run directory, as jobs may start elsewhere.

    Raises:
        UserError: when it names none.
    """
    if config.run.dir is None:
        raise UserError("run.dir is not set: say where the run goes, for example run.dir=runs/d16")
    run = config.run.model_copy(update={"dir": str(Path(config.run.dir).absolute())})
    return config.model_copy(update={"run": run})


def python_of(virtualenv: str | None) -> str:
    """The interpreter of a virtual environment; by default the one that runs now."""
    return sys.executable if virtualenv is None else str(Path(virtualenv) / "bin" / "python")


def _revision() -> tuple[str, str]:
    """`git describe` of the code, and its uncommitted changes; outside git the first says so."""
    source = str(Path(__file__).resolve().parent)
    outputs = []
    for arguments in (("describe", "--always", "--dirty", "--long", "--tags"), ("diff", "HEAD")):
        try:
            done = subprocess.run(
                ["git", "-C", source, *arguments], capture_output=True, text=True, timeout=20, check=True
            )
        except (OSError, subprocess.SubprocessError):
            from hmar_mega import __version__

            return f"version {__version__}, not in a git repository", ""
        outputs.append(done.stdout)
    return outputs[0].strip(), outputs[1]

"""The same runs as jobs, one for each trunk: an array of Slurm, or whatever the launchers of pre-training render."""

import json
import shlex
from collections.abc import Sequence

from etils import epath

from experiments.launch.render import EXIT_INTERRUPTED
from experiments.launch.settings import as_name

_FILE = "configs/scaling_sweep.py"
# Settings that say where and how the runs are carried out, and not what they are.
_OF_PLACE = ("folder", "only", "render", "processes")

_SLURM = """\
#!/bin/bash
# A task for each trunk with its branches. To be started in the repository, by sbatch with whatever the cluster asks for.
# Five minutes before its time is over a task is told to stop; it saves, and is put into the queue again.
#SBATCH --job-name=scaling_sweep
#SBATCH --array=0-{last}
#SBATCH --ntasks=1
#SBATCH --requeue
#SBATCH --signal=TERM@300
#SBATCH --output=scaling_sweep-%A_%a.log

trunks=({trunks})
trunk=${{trunks[$SLURM_ARRAY_TASK_ID]}}
srun {command}
code=$?
if [ $code -eq {interrupted} ]; then
  scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"
fi
exit $code
"""
_LAUNCH = """\
#!/bin/bash
# Has run.py write what runs each trunk with its branches on TPU slices. To be started in the repository:
# bash {path} --launch=gke|gcloud|skypilot --launch.topology=TOPOLOGY --launch.image=IMAGE
set -euo pipefail

launch() {{
  trunk=$1
  {command} "--launch.name=$2" "${{@:3}}"
}}
{calls}
"""


def write_jobs(trunks: Sequence[str], folder: str, workdir: epath.Path) -> list[tuple[str, str]]:
    """Writes jobs/sweep.sbatch and jobs/launch.sh in the workdir; what to type, each with for what.

    Args:
      trunks: names, a job each: its runs follow from one another, and those of different trunks do not.
      folder: of the sweep, which all jobs see. workdir: of the run that renders; its config.json says by which command.
    """
    jobs = workdir / "jobs"
    jobs.mkdir(parents=True, exist_ok=True)
    same = ["python", "run.py", *_arguments(workdir), f"--config.folder={folder}", "--config.processes=1"]
    where = shlex.quote(f"--workdir={folder.rstrip('/')}/jobs/")
    command = " \\\n  ".join([*map(shlex.quote, same), '"--config.only=$trunk"', f'{where}"$trunk"'])
    slurm = {"last": len(trunks) - 1, "trunks": shlex.join(trunks), "command": command, "interrupted": EXIT_INTERRUPTED}
    (jobs / "sweep.sbatch").write_text(_SLURM.format(**slurm))
    calls = "\n".join(f'launch {shlex.quote(trunk)} {as_name(f"sweep-{trunk}")} "$@"' for trunk in trunks)
    (jobs / "launch.sh").write_text(_LAUNCH.format(path=jobs / "launch.sh", command=command, calls=calls))
    options = "--launch=skypilot --launch.topology=TOPOLOGY --launch.image=IMAGE"
    return [("for Slurm", f"sbatch {jobs / 'sweep.sbatch'}"), ("for TPU slices", f"bash {jobs / 'launch.sh'} {options}")]


def _arguments(workdir: epath.Path) -> list[str]:
    """The config and what was changed of it on the command line, as this run was started."""
    path = workdir / "config.json"
    if not path.exists():
        return [f"--config={_FILE}"]
    record = json.loads(path.read_text())
    given = [f"--config={record['invocation']['config']}"]
    for name in record["invocation"]["preset_values"]:
        if name not in _OF_PLACE:
            value = record
            for part in name.split("."):
                value = value[part]
            given.append(f"--config.{name}={','.join(map(str, value)) if isinstance(value, list) else value}")
    return given

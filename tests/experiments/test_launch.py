"""What is rendered for the schedulers validates, hands the command on unharmed, and restarts what should be restarted."""

import configparser
import copy
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml
from conftest import ROOT

import run
from experiments.launch import SCHEDULERS, LaunchConfig, render
from experiments.launch.render import EXIT_INTERRUPTED, EXIT_MISTAKE, EXIT_PEER
from experiments.launch.settings import as_name, parse_topology, same_size
from lfm_jax.configuration import ConfigError, from_mapping
from lfm_jax.sharding import distributed, peers
from lfm_jax.sharding.flags import flags_for
from lfm_jax.training import stopping

SHELLCHECK = Path(sys.executable).parent / "shellcheck"
IMAGE = "europe-docker.pkg.dev/project/images/lfm_jax:1"
WORKDIR = "gs://bucket/runs/nano"
# What a shell, a YAML reader and Kubernetes would each like to change.
PROMPTS = "--config.prompts=it's,\"$HOME\",`b`, $(HOSTNAME) $$ \\"
ARGUMENTS = ["--config=configs/pretrain.py:nano", f"--workdir={WORKDIR}", PROMPTS]
OPTIONS = [
    {"topology": "v5e:16x16"},
    {"topology": "v5p:8x8x8", "slices": 4, "queue": "research", "cluster": "pod", "service_account": "runner"},
    {"topology": "v6e:16x16", "slices": 2, "spot": False, "max_restarts": 0},
]
# `gcloud compute tpus queued-resources create --help` and `delete --help` of the Google Cloud SDK 528.
CREATE_FLAGS = set(
    "accelerator-type async data-disk description guaranteed internal-ips labels metadata metadata-from-file network node-count "
    "node-id node-prefix project range reserved runtime-version scopes service-account shielded-secure-boot spot subnetwork tags "
    "topology type valid-after-duration valid-after-time valid-until-duration valid-until-time zone".split()
)
DELETE_FLAGS = {"async", "force", "project", "quiet", "zone"}
# xpk/parser/workload.py of xpk 1.16.
XPK_FLAGS = set(
    "cluster command docker-image env max-restarts num-slices project restart-on-exit-codes tpu-type workload zone".split()
)


def files(scheduler, arguments=ARGUMENTS, **settings):
    """The rendered contents."""
    settings = {"topology": "v5e:4x4", "image": IMAGE, "project": "project", "zone": "us-west4-a", **settings}
    return list(render(scheduler, from_mapping(LaunchConfig, settings), WORKDIR, arguments).files.values())


def jobset(**settings):
    (content,) = files("gke", **settings)
    return yaml.safe_load(content)


def skypilot(**settings):
    (content,) = files("skypilot", **settings)
    return yaml.safe_load(content)


def validator(name):
    return jsonschema.Draft202012Validator(json.loads((ROOT / f"tests/experiments/schemas/{name}.json").read_text()))


def here_documents(script):
    return re.findall(r"<<'END_OF_FILE'\n(.*?)END_OF_FILE\n", script, re.DOTALL)


@pytest.fixture
def shell(tmp_path):
    """Runs a script with programs of ours in the place of docker, gcloud and sudo; returns what they were called with."""
    folder, seen = tmp_path / "bin", tmp_path / "seen"
    folder.mkdir()
    record = f"printf '%s\\0' \"${{0##*/}}\" \"$@\" $'\\n' >>{shlex.quote(str(seen))}"
    programs = {"docker": record, "gcloud": f'case "$*" in *describe*) echo "$STATE";; *) {record};; esac', "sudo": '"$@"'}
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)

    def call(script, **environment):
        seen.unlink(missing_ok=True)
        environment["PATH"] = f"{folder}:/usr/bin:/bin"
        done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=True)
        calls = [record.split("\0")[:-1] for record in seen.read_text().split("\n\0")[:-1]] if seen.exists() else []
        return calls, done.stdout

    return call


@pytest.mark.parametrize("settings", OPTIONS)
def test_manifests_validate_against_the_published_schemas(settings):
    validator("jobset").validate(jobset(**settings))
    validator("skypilot").validate(skypilot(**settings))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "failurePolicy", "rules", 0, "action"), "Fail"),
        (("spec", "failurePolicy", "maxRestart"), 3),
        (("spec", "replicatedJobs", 0, "replicas"), "two"),
        (("spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "restartPolicy"), "Sometimes"),
        (("spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "containers", 0, "securityContext"), "privileged"),
    ],
)
def test_the_schema_refuses_what_the_cluster_would(path, value):
    wrong = copy.deepcopy(jobset())
    inner = wrong
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    assert list(validator("jobset").iter_errors(wrong))


def expanded(text):
    """As Kubernetes does: $(NAME) is the variable NAME, and $$ is $."""
    return re.sub(r"\$\$|\$\(\w+\)", lambda match: "$" if match[0] == "$$" else "another text", text)


@pytest.mark.parametrize("settings", OPTIONS)
def test_a_jobset_asks_for_all_chips_of_all_slices_and_hands_the_command_on(settings):
    manifest, piece = jobset(**settings), parse_topology(settings["topology"])
    (slices,) = manifest["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert slices["replicas"] == settings.get("slices", 1)
    assert job["parallelism"] == job["completions"] == piece.hosts
    assert job["parallelism"] * container["resources"]["limits"]["google.com/tpu"] == piece.chips
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == piece.topology
    assert ("cloud.google.com/gke-spot" in pod["nodeSelector"]) == settings.get("spot", True)
    assert [expanded(part) for part in container["command"]] == ["python", "run.py", *ARGUMENTS]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    assert environment["JAX_COMPILATION_CACHE_DIR"] == "gs://bucket/compilation_cache"
    flags = flags_for(piece.generation, settings.get("slices", 1))
    assert environment["LIBTPU_INIT_ARGS"].split() == [f"--{name}={value}" for name, value in flags.items()]
    assert flags and pod.get("hostNetwork", False) == (settings.get("slices", 1) > 1)
    assert pod.get("serviceAccountName") == settings.get("service_account")
    assert manifest["metadata"].get("labels", {}).get("kueue.x-k8s.io/queue-name") == settings.get("queue")


def jobset_action(manifest, exit_code=None, disrupted=False):
    """What JobSet does with a pod's end, as its documentation says and Kubernetes words a job's failure.

    KEP-262 of JobSet and kubernetes/pkg/controller/job/pod_failure_policy.go: of the job's rules the first that matches fails it,
    with the rule's index in the message; without one it fails for its backoff limit. None: the default, a counted restart.
    """
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for index, rule in enumerate(job["podFailurePolicy"]["rules"]):
        codes = rule.get("onExitCodes")
        if exit_code in codes["values"] if codes else disrupted:
            reason, message = "PodFailurePolicy", f"... exit code {exit_code} matching FailJob rule at index {index}"
            break
    for rule in manifest["spec"]["failurePolicy"]["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule["onJobFailureReasons"] and any(re.search(pattern, message) for pattern in patterns):
            return rule["action"]
    return None


def test_a_jobset_restarts_an_interruption_but_no_mistake():
    manifest = jobset(max_restarts=7)
    assert jobset_action(manifest, EXIT_INTERRUPTED) == "RestartJobSetAndIgnoreMaxRestarts"
    assert jobset_action(manifest, 137, disrupted=True) == "RestartJobSetAndIgnoreMaxRestarts"
    assert jobset_action(manifest, EXIT_MISTAKE) == "FailJobSet"
    assert {jobset_action(manifest, code) for code in (1, EXIT_PEER, 134, 137)} == {None}
    assert manifest["spec"]["failurePolicy"]["maxRestarts"] == 7
    assert manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["backoffLimit"] == 0


def test_skypilot_restarts_an_interruption_but_no_mistake():
    recovery = skypilot()["resources"]["job_recovery"]
    assert recovery == {"recover_on_exit_codes": [EXIT_INTERRUPTED, EXIT_PEER], "max_restarts_on_errors": 0}


def test_systemd_on_a_tpu_vm_restarts_an_interruption_but_no_mistake():
    _, text = here_documents(files("gcloud", max_restarts=7)[0])
    unit = configparser.ConfigParser()
    unit.optionxform = str
    unit.read_string(text)
    assert unit["Service"]["Restart"] == "on-failure"
    assert unit["Service"]["RestartForceExitStatus"] == str(EXIT_INTERRUPTED)
    assert unit["Service"]["RestartPreventExitStatus"] == str(EXIT_MISTAKE)
    assert unit["Unit"]["StartLimitBurst"] == "8"  # the first start and seven more


def test_the_exit_codes_are_those_of_a_run(monkeypatch, capsys):
    assert EXIT_INTERRUPTED == stopping.EXIT_INTERRUPTED == distributed.EXIT_AGAIN
    assert EXIT_PEER == peers.EXIT_PEER
    assert run.main(["--no_such_flag"]) == EXIT_MISTAKE


@pytest.mark.parametrize("settings", OPTIONS)
def test_a_tpu_vm_runs_the_command_in_the_container(settings, shell):
    script, _ = here_documents(files("gcloud", **settings)[0])
    ((program, *arguments),), _ = shell(script, HOSTNAME="wrong")
    image = arguments.index(IMAGE)
    assert program == "docker" and arguments[image + 1 :] == ["python", "run.py", *ARGUMENTS]
    environment = dict(argument.removeprefix("--env=").split("=", 1) for argument in arguments[:image] if "--env" in argument)
    flags = flags_for(parse_topology(settings["topology"]).generation, settings.get("slices", 1))
    assert environment == {
        "JAX_PLATFORMS": "tpu,cpu",
        "JAX_COMPILATION_CACHE_DIR": "gs://bucket/compilation_cache",
        "LIBTPU_INIT_ARGS": " ".join(f"--{name}={value}" for name, value in flags.items()),
    }
    assert {"--privileged", "--network=host"} <= set(arguments[:image])


def test_skypilot_runs_the_command_in_the_container_and_numbers_the_slices(shell):
    task = skypilot(topology="v5e:4x4", slices=2)
    addresses = "".join(f"10.0.0.{number}\n" for number in range(8))
    slices = []
    for rank in range(8):
        node = {"SKYPILOT_NODE_RANK": str(rank), "SKYPILOT_NUM_NODES": "8", "SKYPILOT_NODE_IPS": addresses}
        (remove, (_, *arguments)), _ = shell(task["run"], **node)
        assert remove == ["docker", "rm", "--force", "nano"]
        assert arguments[arguments.index(IMAGE) + 1 :] == ["python", "run.py", *ARGUMENTS]
        assert {"--env=MEGASCALE_COORDINATOR_ADDRESS=10.0.0.0", "--env=MEGASCALE_NUM_SLICES=2"} <= set(arguments)
        slices += [argument.rpartition("=")[2] for argument in arguments if "MEGASCALE_SLICE_ID" in argument]
    assert slices == list("00001111") and task["num_nodes"] == 2
    assert task["resources"]["accelerators"] == "tpu-v5litepod-16"


@pytest.mark.parametrize("settings", OPTIONS)
@pytest.mark.parametrize(("state", "verbs"), [("", ["create"]), ("SUSPENDED", ["delete", "create"]), ("ACTIVE", [])])
def test_the_request_for_machines_is_made_once_and_anew_after_a_preemption(settings, state, verbs, shell):
    calls, printed = shell(files("gcloud", **settings)[1], STATE=state)
    assert [call[4] for call in calls] == verbs
    assert all(call[:4] == ["gcloud", "compute", "tpus", "queued-resources"] and call[5] == "nano" for call in calls)
    assert ("nano is ACTIVE: there is nothing to do" in printed) == (state == "ACTIVE")
    for call in calls:
        given = dict(argument.removeprefix("--").partition("=")[::2] for argument in call[6:])
        assert set(given) <= {"create": CREATE_FLAGS, "delete": DELETE_FLAGS}[call[4]]
        assert (given["project"], given["zone"]) == ("project", "us-west4-a")
    if calls:
        slices = settings.get("slices", 1)
        assert ("spot" in given) == settings.get("spot", True)
        assert given.get("node-count", "1") == str(slices) and ("node-id" in given) == (slices == 1)
        assert given["accelerator-type"] == parse_topology(settings["topology"]).accelerator_type
        assert given["metadata-from-file"] == "startup-script=nano.startup.sh"


@pytest.mark.parametrize("settings", [*OPTIONS, {"image": "alpine:3"}])
def test_shell_scripts_are_sound(settings, tmp_path):
    task = skypilot(**settings)
    startup, create = files("gcloud", **settings)
    scripts = [startup, create, here_documents(startup)[0], *(f"#!/bin/bash\n{task[part]}" for part in ("setup", "run"))]
    for number, text in enumerate(scripts):
        (tmp_path / f"{number}.sh").write_text(text)
    paths = sorted(tmp_path.iterdir())
    for path in paths:
        assert subprocess.run(["bash", "-n", path], capture_output=True, text=True).stderr == ""
    # SC1003, SC2016: a backslash and a $ in the quotes of the command are the command's.
    checked = subprocess.run([SHELLCHECK, "--exclude=SC1003,SC2016", *paths], capture_output=True, text=True)
    assert checked.stdout == "" and checked.returncode == 0


def test_xpk_gets_the_same():
    (content,) = files("gke", topology="v5p:8x8x8", slices=2, cluster="pod")
    comment = content.partition("the same is:\n")[2].partition("apiVersion")[0]
    words = shlex.split("\n".join(line.removeprefix("#") for line in comment.splitlines()).replace("\\\n  ", " "))
    assert words[:3] == ["xpk", "workload", "create"]
    given = [word.removeprefix("--").partition("=")[::2] for word in words[3:]]
    assert {name for name, _ in given} == XPK_FLAGS
    values = dict(given)
    assert shlex.split(values["command"]) == ["python", "run.py", *ARGUMENTS]
    assert (values["cluster"], values["tpu-type"], values["num-slices"]) == ("pod", "v5p-1024", "2")
    assert values["restart-on-exit-codes"] == f"{EXIT_INTERRUPTED},{EXIT_PEER}"
    (other,) = files("gke", topology="v5p:4x8x16")
    assert "xpk" not in other  # to it, v5p-1024 is 8x8x8


@pytest.mark.parametrize(
    ("topology", "accelerator_type", "hosts"),
    # cloud.google.com/tpu/docs: v5e, v5p, v6e; cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus
    [
        ("v5e:1x1", "v5litepod-1", 1),
        ("v5e:16x16", "v5litepod-256", 64),
        ("v5p:2x2x1", "v5p-8", 1),
        ("v5p:8x8x8", "v5p-1024", 128),
        ("v5p:8x8x12", "v5p-1536", 192),
        ("v5p:16x16x24", "v5p-12288", 1536),
        ("v6e:16x16", "v6e-256", 64),
        ("tpu7x:4x4x4", "tpu7x-128", 16),
    ],
)
def test_topologies_have_their_published_names(topology, accelerator_type, hosts):
    piece = parse_topology(topology)
    assert (piece.accelerator_type, piece.hosts) == (accelerator_type, hosts)
    assert same_size(piece) == piece.topology


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"topology": "v5e:16x15"}, "topology: 'v5e:16x15' is no slice. Did you mean 'v5e:16x16'? Valid choices: v5e:1x1, "),
        ({"topology": "v5p:8x8x9"}, "topology: 'v5p:8x8x9' is no slice. Did you mean 'v5p:8x8x"),
        ({"topology": "v5p:16x16x32"}, "topology: 'v5p:16x16x32' is no slice"),
        ({"topology": "v6:16x16"}, "topology: 'v6:16x16' is of no TPU generation. Did you mean 'v6e'? Valid choices: v5e, v5p, "),
        ({"slices": 0}, "slices: must be at least 1, got 0"),
        ({"max_restarts": -1}, "max_restarts: must not be negative, got -1"),
        ({"image": "no image"}, "image: 'no image' is no name of a container image, like REGION-docker.pkg.dev/"),
        ({"name": "First_Run"}, "name: 'First_Run' must be lower-case letters, digits and dashes, like 'first-run'"),
        ({"compilation_cache": "cache"}, "compilation_cache: 'cache' does not outlive a pod; give a folder on gs://"),
    ],
)
def test_a_wrong_setting_is_told(settings, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        from_mapping(LaunchConfig, {"topology": "v5e:4x4", "image": IMAGE, **settings})


@pytest.mark.parametrize(
    ("scheduler", "workdir", "settings", "message"),
    [
        ("gk", WORKDIR, {}, "--launch=gk: there is no such scheduler. Did you mean 'gke'? Valid choices: gke, gcloud, skypilot."),
        ("gke", "runs/nano", {}, "--workdir=runs/nano does not outlive a machine that is taken away; give a folder on gs://."),
        ("gke", "gs://bucket/7", {}, "--workdir=gs://bucket/7 does not end on a name for the job; give --launch.name=NAME."),
        ("gcloud", WORKDIR, {}, "--launch.project, --launch.zone: gcloud must be told; there is no default."),
        ("skypilot", WORKDIR, {"topology": "tpu7x:4x4x4"}, "tpu7x:4x4x4: SkyPilot has no tpu7x; use --launch=gke."),
        ("skypilot", WORKDIR, {"topology": "v5p:4x8x16"}, "asks for v5p-1024, which is 8x8x8; give --launch.topology=v5p:8x8x8"),
    ],
)
def test_what_a_scheduler_cannot_run_is_told(scheduler, workdir, settings, message):
    config = LaunchConfig(**{"topology": "v5e:4x4", "image": IMAGE, **settings})
    with pytest.raises(ConfigError, match=re.escape(message)):
        render(scheduler, config, workdir, [])


def test_a_line_break_in_the_command_is_refused():
    with pytest.raises(ConfigError, match="'--config.prompts=a.nb' has a line break, which not every scheduler hands on"):
        files("gke", arguments=["--config.prompts=a\nb"])


def test_names_fit_every_scheduler():
    assert as_name("LFM2_350M.first") == "lfm2-350m-first"
    assert as_name("2b/" + "long " * 20) == "b-" + "-".join(["long"] * 20)[:34].rstrip("-")


COMMAND = [
    "--config=configs/pretrain.py:lfm2_350m", f"--workdir={WORKDIR}", "--config.data.source=gs://bucket/text",
    "--launch.topology=v5e:16x16", f"--launch.image={IMAGE}", "--launch.project=project", "--launch.zone", "us-west4-a",
]  # fmt: skip


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_dry_run_prints_what_is_written_otherwise(scheduler, capsys, tmp_path):
    assert run.main([*COMMAND, f"--launch={scheduler}", "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert run.main([*COMMAND, f"--launch={scheduler}", f"--launch.folder={tmp_path}/new"]) == 0
    told = capsys.readouterr().out
    written = list((tmp_path / "new").iterdir())
    assert written and all(path.read_text() in printed and f"wrote {path}" in told for path in written)
    assert "--config=configs/pretrain.py:lfm2_350m" in printed
    start = {"gke": "kubectl apply -f ", "gcloud": "bash ", "skypilot": "sky jobs launch "}[scheduler]
    assert start in told.partition("Nothing runs yet.")[2] and start in printed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--config.mesh.data=3"], "--config.mesh: mesh data=3 needs 3 devices, 256 are there"),
        (["--launch.topology=v5p:8x8x8"], "--config.mesh: a batch of 256 rows does not divide into 1 micro-batches over"),
        (["--launch.slices=2", "--config.mesh.data=1", "--config.mesh.fsdp=-1"], "mesh fsdp=512 over 2 slices: each slice must"),
        (["--launch.topology=tpu7x:4x4x8", "--config.mesh.data=3"], "mesh data=3 needs 3 devices, 256 are there"),
        (["--config.loader.stages=[{'from_step': 9, 'batch_size': 384}]"], "--config.mesh: a batch of 384 rows does not divide"),
        (
            ["--config.loader.stages=[{'from_step': 9, 'seq_len': 1020}]", "--config.mesh.context=4"],
            "--config.mesh: a sequence of 1020 does not divide",
        ),
        (["--config.mesh.tensor=32"], "--config.mesh: tensor=32 does not divide heads = 16 of "),
    ],
)
def test_what_the_slices_would_refuse_is_refused_before(changes, message, capsys):
    assert run.main([*COMMAND, *changes, "--launch=gke", "--dry_run"]) == EXIT_MISTAKE
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_mesh_of_each_machine_is_not_held_against_all_of_them(capsys):
    """Preference data are made by machines that share nothing."""
    command = ["--config=configs/preference_data.py", "--config.init_from=gs://bucket/sft", "--config.tasks=arithmetic"]
    launch = ["--config.mesh.fsdp=4", "--launch.slices=2", "--launch=gke", "--dry_run"]
    assert run.main([*command, COMMAND[1], *COMMAND[3:], *launch]) == 0
    assert "--config.mesh.fsdp=4" in capsys.readouterr().out


def test_what_a_dry_run_prints_is_a_manifest(capsys):
    run.main([*COMMAND, "--launch=gke", "--dry_run"])
    manifest = yaml.safe_load(capsys.readouterr().out)
    validator("jobset").validate(manifest)
    command = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]["command"]
    assert command == ["python", "run.py", *COMMAND[:3]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*COMMAND, "--launch=gke", "--config.train.stps=1"], "--config.train.stps: no such field. Did you mean 'train.steps'?"),
        ([*COMMAND[:2], "--launch=gke"], "give data.source, the text to train on, or tokens_from, workdirs of tokenized text"),
        ([*COMMAND[:3], "--launch=gke"], "--launch.topology, image: there is no default, so a value must be given."),
        ([*COMMAND, "--launch=gke", "--launch.slces=2"], "--launch.slces: no such field. Did you mean 'slices'? Valid choices: "),
        ([*COMMAND, "--launch=gke", "--launch.slices=two"], "--launch.slices: expected a whole number, got 'two' (str)."),
        ([*COMMAND, "--launch=slurm"], "--launch=slurm: there is no such scheduler. Valid choices: gke, gcloud, skypilot."),
    ],
)
def test_a_mistake_in_what_is_launched_is_told_here_and_in_one_paragraph(arguments, message, capsys):
    assert run.main(arguments) == 2
    told = capsys.readouterr().err
    assert told.startswith("run.py: ") and message in told and told.count("\n") == 1


def test_a_config_outside_of_the_image_is_refused(tmp_path, capsys):
    (tmp_path / "mine.py").write_text((ROOT / "configs/parameter_audit.py").read_text())
    assert run.main([f"--config={tmp_path}/mine.py", f"--workdir={WORKDIR}", "--launch=gke", *COMMAND[3:]]) == 2
    assert "mine.py is not in the container image; put the file into " in capsys.readouterr().err


def test_the_page_names_only_what_there_is():
    """Each command in docs/launching.md is understood."""
    page = (ROOT / "docs/launching.md").read_text().replace("\\\n", " ")
    commands = [shlex.split(line)[2:] for line in page.splitlines() if line.strip().startswith("python run.py")]
    assert len(commands) >= 3
    for command in commands:
        assert run.main([*command, "--dry_run"]) == 0


# Runs a command, and then says from which files its modules of the project are.
_WHERE_MODULES_LIE = """
import runpy, sys
sys.argv, sys.path[0] = sys.argv[1:], ""
try:
    runpy.run_path("run.py", run_name="__main__")
finally:
    ours = ("lfm_jax", "experiments", "configs", "data_pipelines")
    files = [each.__file__ for name, each in sys.modules.items() if name.split(".")[0] in ours and hasattr(each, "__file__")]
    print(*files, sep="\\n")
"""


def test_what_the_image_holds_is_enough_for_a_job(tmp_path):
    """The builder is sent what the Dockerfile copies, and a command that has nothing else finds all its modules there."""
    sent = {line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copies = [line.split()[1:] for line in (ROOT / "Dockerfile").read_text().splitlines() if line.startswith("COPY")]
    assert sent == {name for *names, _ in copies for name in names}
    for *names, target in copies:
        for name in names:
            place = tmp_path / target / name if target.endswith("/") else tmp_path / target
            (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, place)
    listed = subprocess.run(
        [sys.executable, "-c", _WHERE_MODULES_LIE, "run.py", "--list"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "configs/pretrain.py" in listed.stdout
    launched = subprocess.run(
        [sys.executable, "-c", _WHERE_MODULES_LIE, "run.py", *ARGUMENTS, "--launch=gke", "--dry_run",
         "--launch.topology=v5e:4x4", f"--launch.image={IMAGE}"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    modules = [line for line in launched.stdout.splitlines() if line.endswith("__init__.py")]
    assert modules and all(line.startswith(str(tmp_path)) for line in modules)

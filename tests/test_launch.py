"""The scripts of launch/: what --dry_run prints is what is done, in order, and a failure stops and is told.

Tools of the cloud and of SLURM are replaced by programs that write down how they were called.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
from pathlib import Path

import jax
import pytest

from align_jax import mesh

ROOT = Path(__file__).parents[1]
FAKES = ("bash", "docker", "gcloud", "git", "nvidia-smi", "python", "sbatch", "sleep", "xpk")
FAKE = r"""#!/bin/bash
{ printf '%s' "${0##*/}"; printf '\x1f%s' "$@"; printf '\n'; } >>"$CALLS"
eval "${ON_CALL:-}"
"""
COMMAND = ["python", "-m", "align_jax.train", "--config=configs/dpo.py", "--config.run=runs/dpo",
           "--config.data.path=the 'best' pairs.jsonl"]
SETTINGS = {"NAME": "pod", "ZONE": "us-west4-a", "TYPE": "v5litepod-64", "SHARED": "gs://bucket",
            "IMAGE": "eu.pkg.dev/p/r/align_jax"}
XPK = ["--cluster=tpus", "--workload=dpo", "--tpu-type=v5litepod-64"]
SSH = "gcloud compute tpus tpu-vm ssh pod --zone=us-west4-a --worker="
SCOPES = "--scopes=https://www.googleapis.com/auth/cloud-platform"
WORKER = "bash align_jax/launch/tpu_worker.sh"
GPU_SETTINGS = "export JAX_PLATFORMS=cuda XLA_PYTHON_CLIENT_MEM_FRACTION=0.92"



def quoted(text: str) -> str:
    return "'" + text.replace("'", r"'\''") + "'"


PASTED = f"{' '.join(COMMAND[:-1])} --config.data.path=" + quoted("the 'best' pairs.jsonl")
DRY_RUNS = {  # what is called -> the lines that are printed
    ("gpu.sh", *COMMAND): [
        "nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv",
        "export EXTRAS=cuda", "source tools/venv.sh", GPU_SETTINGS, PASTED],
    ("slurm.sh", "--nodes=2", "--gpus-per-node=8", *COMMAND): [
        "export EXTRAS=cuda", "source tools/venv.sh", "mkdir -p runs",
        f"sbatch --nodes=2 --gpus-per-node=8 launch/slurm_job.sh {PASTED}"],
    ("xpk.sh", *XPK, "--max-restarts=3", *COMMAND): [
        "bash -o pipefail -c 'git archive HEAD | docker build --platform=linux/amd64 --file=launch/Dockerfile "
        "--tag=eu.pkg.dev/p/r/align_jax:abc -'",
        "docker push eu.pkg.dev/p/r/align_jax:abc",
        "xpk workload create --docker-image=eu.pkg.dev/p/r/align_jax:abc --max-restarts=50 "
        f"--termination-grace-period-seconds=120 {' '.join(XPK)} --max-restarts=3 --command="
        + quoted(f"exec {PASTED}")],
    ("tpu.sh", "create"): [
        f"gcloud compute tpus tpu-vm create pod --zone=us-west4-a --accelerator-type=v5litepod-64 {SCOPES} "
        "--version=v2-alpha-tpuv5-lite"],
    ("tpu.sh", "queue"): [
        f"gcloud compute tpus queued-resources create pod --zone=us-west4-a --accelerator-type=v5litepod-64 {SCOPES} "
        "--runtime-version=v2-alpha-tpuv5-lite --node-id=pod",
        "# every 30 s, until it says ACTIVE:",
        "gcloud compute tpus queued-resources describe pod --zone=us-west4-a --format='value(state.state)'"],
    ("tpu.sh", "install"): [
        "git archive --format=tar.gz --output=/tmp/align_jax-pod.tar.gz HEAD",
        "gcloud compute tpus tpu-vm scp /tmp/align_jax-pod.tar.gz pod:align_jax.tar.gz --zone=us-west4-a --worker=all",
        f"{SSH}all --command='mkdir -p align_jax && tar -xzf align_jax.tar.gz -C align_jax'",
        f"{SSH}all --command='{WORKER} install gs://bucket'"],
    ("tpu.sh", "run", *COMMAND): [
        f"{SSH}all --command=" + quoted(f"{WORKER} start {PASTED}"),
        f"{SSH}0 --command='{WORKER} log'"],
    ("tpu.sh", "log"): [f"{SSH}0 --command='{WORKER} log'"],
    ("tpu.sh", "status"): [
        "gcloud compute tpus queued-resources list --zone=us-west4-a --filter=name:pod",
        "gcloud compute tpus tpu-vm list --zone=us-west4-a --filter=name:pod",
        f"{SSH}all --command='{WORKER} status'"],
    ("tpu.sh", "stop"): [f"{SSH}all --command='{WORKER} stop'"],
    ("tpu.sh", "collect", "runs/dpo/hf"): [
        "mkdir -p runs/dpo/hf", "gcloud storage rsync --recursive gs://bucket/dpo/hf runs/dpo/hf"],
    ("tpu.sh", "delete", "--yes"): [
        "bash -c 'gcloud compute tpus queued-resources delete pod --zone=us-west4-a --force --quiet || "
        "gcloud compute tpus tpu-vm delete pod --zone=us-west4-a --quiet'"],
}
WRONG = {  # the call, and settings that differ -> the one line of the answer
    ("gpu.sh",): "got '', expected a command: python -m align_jax.train",
    ("gpu.sh", "python", "train.py"): "got 'python train.py', expected a command",
    ("gpu.sh", "--fast", *COMMAND): "got '--fast' before the command",
    ("gpu.sh", "python", "-m", "align_jax.trian"): "got 'align_jax.trian', of which there is no file align_jax/",
    ("xpk.sh", XPK[0], "--workload=DPO_1", XPK[2], *COMMAND): "--workload: expected small letters, digits and -, as",
    ("slurm.sh", "--nodes=2"): "got '--nodes=2', expected a command",
    ("xpk.sh", *XPK[1:], *COMMAND): "--cluster=... is missing before the command",
    ("xpk.sh", *XPK, *COMMAND, "IMAGE="): "IMAGE is not set, as in: export IMAGE=",
    ("tpu.sh",): "got '', expected create, queue, install, run, log, status, stop, collect or delete",
    ("tpu.sh", "destroy"): "got 'destroy', expected create",
    ("tpu.sh", "create", "NAME="): "NAME is not set, as in: export NAME=",
    ("tpu.sh", "create", "TYPE=v9x-8"): "TYPE: got 'v9x-8', expected v2, v3",
    ("tpu.sh", "create", "TYPE=v4-big"): "TYPE: got 'v4-big', expected v2, v3",
    ("tpu.sh", "create", "TYPE=-8"): "TYPE: got '-8', expected v2, v3",
    ("tpu.sh", "create", "now"): "create: got 'now', expected nothing after it",
    ("tpu.sh", "create", "SLICES=2"): "create makes one slice; SLICES=2 needs queue",
    ("tpu.sh", "queue", "SLICES=two"): "SLICES: got 'two', expected a number",
    ("tpu.sh", "queue", "SHARED="): "v5litepod-64 has several hosts, which need one folder for their run: set SHARED",
    ("tpu.sh", "queue", "SPOT=yes"): "SPOT: got 'yes', expected 1 or 0",
    ("tpu.sh", "collect", "runs/../../x"): "collect: got 'runs/../../x', expected a folder in runs/",
    ("tpu.sh", "install", "SHARED="): "v5litepod-64 has several hosts, which need one folder for their run: set SHARED",
    ("tpu.sh", "run", "python", "x.py"): "got 'python x.py', expected a command",
    ("gpu.sh", *COMMAND, "JAX_PLATFORMS=cpu"): "JAX_PLATFORMS: got 'cpu' from the environment, expected cuda",
    ("xpk.sh", *XPK[:2], "--tpu-type=v5e-64", *COMMAND): "--tpu-type: got 'v5e-64', expected v4, v5litepod, v5p",
    ("xpk.sh", *XPK[:2], "--tpu-type=v6e-63", *COMMAND): "--tpu-type: got 'v6e-63', expected v4, v5litepod, v5p",
    ("xpk.sh", *XPK, *COMMAND[:3], "--config.run=/tmp/dpo"): "--config.run: got '/tmp/dpo', expected a folder in runs/",
    ("tpu.sh", "run", *COMMAND, "-config.run=runs/../out"): "--config.run: got 'runs/../out', expected a folder",
    ("tpu.sh", "run", *COMMAND[:3], "--config.run", "out"): "--config.run: got 'out', expected a folder in runs/",
    ("tpu.sh", "create", "TYPE=v5litepod-63"): "TYPE: got 'v5litepod-63', expected v2, v3",
    ("tpu.sh", "create", "TYPE=v5e-64"): "TYPE: got 'v5e-64', expected v2, v3",
    ("tpu.sh", "install", "SHARED=bucket"): "SHARED: got 'bucket', expected gs://BUCKET or HOST:/SHARE",
    ("tpu.sh", "install", "SHARED=gs:/bucket"): "SHARED: got 'gs:/bucket', expected gs://BUCKET or HOST:/SHARE",
    ("tpu.sh", "install", "SHARED=gs://bucket/a/"): "SHARED: got 'gs://bucket/a/', expected gs://BUCKET or",
    ("tpu.sh", "install", "SHARED=s3://bucket"): "SHARED: got 's3://bucket', expected gs://BUCKET or HOST:/SHARE",
    ("tpu.sh", "collect", "/etc"): "collect: got '/etc', expected a folder in runs/",
    ("tpu.sh", "delete", "--yes", "--yes"): "delete: pod in us-west4-a",
    ("tpu.sh", "delete"): "delete: pod in us-west4-a and all that is on its disks goes; add --yes",
}


@pytest.fixture
def repository(tmp_path):
    """A copy of what the scripts need, with a stand-in for the installation."""
    for folder in ("launch", "tools"):
        shutil.copytree(ROOT / folder, tmp_path / "repo" / folder, ignore=shutil.ignore_patterns("*.py"))
    (tmp_path / "repo" / "align_jax").symlink_to(ROOT / "align_jax")
    (tmp_path / "repo" / "tools" / "venv.sh").write_text('printf "venv %s\\n" "$EXTRAS" >>"$CALLS"\n')
    return tmp_path / "repo"


@pytest.fixture
def launch(repository, tmp_path):
    """Run a script among stand-ins for every tool; `on_call` is what these do, in bash; settings as NAME=value."""
    tools = tmp_path / "tools"
    fake(tools, *FAKES)

    def run(script: str, *words: str, path: str = f"{tools}:/usr/bin:/bin", on_call="[ $1 != rev-parse ] || echo abc"):
        settings = dict(word.split("=", 1) for word in words if re.match("[A-Z_]+=", word))
        return subprocess.run(
            ["/bin/bash", repository / "launch" / script, *(word for word in words if not re.match("[A-Z_]+=", word))],
            env=SETTINGS | settings | {"PATH": path, "CALLS": str(tmp_path / "calls"), "ON_CALL": on_call},
            capture_output=True, text=True, timeout=30)

    return run


def fake(folder: Path, *names: str, program: str = FAKE) -> None:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_text(program)
        (folder / name).chmod(0o755)


def calls(tmp_path) -> list[list[str]]:
    """How the stand-ins were called, but for what only asks git."""
    path = tmp_path / "calls"
    found = [line.split("\x1f") for line in path.read_text().splitlines()] if path.exists() else []
    return [words for words in found if words[:2] not in (["git", "rev-parse"], ["git", "diff"])]


@pytest.mark.parametrize("script", ["gpu.sh", "slurm.sh", "tpu.sh", "xpk.sh"])
def test_help_is_what_the_script_says_of_itself(script, launch):
    done = launch(script, "--help")
    assert done.returncode == 0 and f"launch/{script} " in done.stdout and "#" not in done.stdout


@pytest.mark.parametrize("call", DRY_RUNS, ids=lambda call: " ".join(call[:2]))
def test_a_dry_run_prints_what_is_done_and_does_nothing(call, launch, tmp_path):
    few = tmp_path / "few"  # a dry run needs no more than this, git for the name of an image
    few.mkdir()
    for name in ("dirname", "seq", "bash"):
        (few / name).symlink_to(shutil.which(name))
    fake(few, "git", program="#!/bin/bash\n[ $1 != rev-parse ] || echo abc\n")
    before = sorted(tmp_path.rglob("*"))
    done = launch(call[0], "--dry_run", *call[1:], path=str(few))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == DRY_RUNS[call]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("call", [
    ("tpu.sh", "delete", "--yes", "--dry_run"), ("tpu.sh", "queue", "--dry-run"), ("slurm.sh", "--nodes=2", "--dry-run",
    *COMMAND), ("gpu.sh", *COMMAND, "--dry_run"), ("tpu.sh", "run", *COMMAND, "--dry_run")],
    ids=lambda call: " ".join(call[:2]))
def test_a_dry_run_may_be_asked_for_anywhere(call, launch, tmp_path):
    done = launch(*call)
    assert (done.returncode, done.stderr, calls(tmp_path)) == (0, "", [])
    assert "dry" not in done.stdout


@pytest.mark.parametrize("call", DRY_RUNS, ids=lambda call: " ".join(call[:2]))
def test_what_a_dry_run_prints_is_what_is_called(call, launch, tmp_path, repository):
    done = launch(*call, on_call='[ "$1" != rev-parse ] || echo abc; [[ "$*" != *state.state* ]] || echo ACTIVE')
    assert done.returncode == 0, done.stderr
    printed = [shlex.split(line) for line in DRY_RUNS[call] if not line.startswith("#")]
    expected = [["venv cuda"] if words[0] == "source" else words for words in printed
                if words[0] not in ("export", "mkdir")]
    assert calls(tmp_path) == expected
    assert [line.removeprefix("+ ") for line in done.stderr.splitlines() if line.startswith("+ ")] == [
        line for line in DRY_RUNS[call] if not line.startswith("#")]
    assert all((repository / words[2]).is_dir() for words in printed if words[0] == "mkdir")


@pytest.mark.parametrize("call", DRY_RUNS, ids=lambda call: " ".join(call[:2]))
def test_the_first_failure_stops_and_is_told(call, launch, tmp_path):
    done = launch(*call, on_call="case $1 in rev-parse) echo abc ;; diff) ;; *) exit 3 ;; esac")
    assert done.returncode == 3
    (only,) = [words for words in calls(tmp_path) if words != ["venv cuda"]]
    assert done.stderr.splitlines()[-1].startswith(f"error: exit status 3 of: {only[0]} ")


def test_a_command_on_gpus_takes_the_place_of_the_script(launch, tmp_path):
    done = launch("gpu.sh", *COMMAND, on_call='[ $1 != -m ] || { echo $$ $JAX_PLATFORMS $EXTRAS; kill -TERM $$; }')
    assert done.returncode == -signal.SIGTERM  # so a signal to the script is one to the command
    assert done.stdout.split()[1:] == ["cuda", "cuda"]
    done = launch("gpu.sh", *COMMAND, "JAX_PLATFORMS=cuda,cpu", on_call="echo $JAX_PLATFORMS")
    assert done.stdout.splitlines()[-1] == "cuda,cpu"


@pytest.mark.parametrize("call", WRONG, ids=lambda call: " ".join(call)[:40])
def test_a_mistake_is_one_line_and_exit_status_2(call, launch, tmp_path):
    done = launch(*call)
    assert (done.returncode, done.stdout, calls(tmp_path)) == (2, "", [])
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {WRONG[call]}")


def test_changes_that_stay_here_are_told(launch):
    for call in (("tpu.sh", "install"), ("xpk.sh", *XPK, *COMMAND)):
        done = launch(*call, on_call="case $1 in rev-parse) echo abc ;; diff) exit 1 ;; esac")
        assert done.returncode == 0, done.stderr
        assert done.stderr.startswith("note: changes that are not committed stay here\n")


@pytest.mark.parametrize("call", [
    *(("tpu.sh", "create", f"TYPE={name}") for name in ("v2-8", "v4-384", "v5p-128", "v6e-1")),
    *(("xpk.sh", *XPK[:2], f"--tpu-type={name}", *COMMAND) for name in ("v4-384", "tpu7x-64", "v5p-12x16x32"))],
    ids=lambda call: re.search("(TYPE|--tpu-type)=(\\S+)", " ".join(call))[2])
def test_names_of_slices_that_there_are(call, launch):
    assert launch(*call, "--dry_run").returncode == 0


def test_spot_slices_of_another_project(launch):
    done = launch("tpu.sh", "--dry_run", "queue", "SLICES=2", "SPOT=1", "PROJECT=mine", "TYPE=v6e-16", "RUNTIME=newest")
    assert done.stdout.splitlines()[0] == (
        "gcloud compute tpus queued-resources create pod --zone=us-west4-a --project=mine --accelerator-type=v6e-16 "
        f"{SCOPES} --spot --runtime-version=newest --node-count=2 --node-prefix=pod")
    lines = launch("tpu.sh", "--dry_run", "run", *COMMAND, "SLICES=2").stdout.splitlines()
    assert [re.search(r"ssh (\S+) .*--worker=(\w+)", line).groups() for line in lines] == [
        ("pod-0", "all"), ("pod-1", "all"), ("pod-0", "0")]
    copied = launch("tpu.sh", "--dry_run", "collect", "runs/dpo", "SHARED=10.0.0.2:/share").stdout.splitlines()
    assert copied[1] == ("gcloud compute tpus tpu-vm scp --recurse pod:align_jax/runs/dpo runs --zone=us-west4-a "
                         "--worker=0")


@pytest.mark.parametrize("states, status, waits", [
    (["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"], 0, 2),
    (["WAITING_FOR_RESOURCES", "FAILED"], 1, 1),
    (["SUSPENDED"], 1, 0),
    ([], 1, 0),  # gcloud does not answer
])
def test_the_queue_is_waited_for(states, status, waits, launch, tmp_path):
    (tmp_path / "states").write_text("\n".join(states) + "\n")
    done = launch("tpu.sh", "queue", on_call=f'[[ "$*" != *state.state* ]] || '
                                             f'{{ grep -m1 . {tmp_path}/states && sed -i 1d {tmp_path}/states; }}')
    assert done.returncode == status, done.stderr
    assert [words for words in calls(tmp_path) if words[0] == "sleep"] == [["sleep", "30"]] * waits
    last = states[-1] if states else "no answer"
    assert done.stderr.splitlines()[-1].startswith({
        "ACTIVE": "+ gcloud compute tpus queued-resources describe",
        "no answer": "error: exit status 1 of: gcloud compute tpus queued-resources describe",
    }.get(last, f"error: pod is {last}; delete it and queue again"))


@pytest.mark.parametrize("queued", [True, False])
def test_what_was_made_is_deleted_and_what_was_queued_too(queued, launch, tmp_path):
    (tmp_path / "tools" / "bash").unlink()
    done = launch("tpu.sh", "delete", "--yes", on_call="[ $3 != queued-resources ]" if not queued else "true")
    assert done.returncode == 0, done.stderr
    assert [words[3] for words in calls(tmp_path)] == ["queued-resources"] + ["tpu-vm"] * (not queued)
    assert launch("tpu.sh", "delete", "--yes", on_call="exit 3").returncode == 3  # neither was deleted


# -- on the workers ------------------------------------------------------------------------------------------

STAND_IN = """#!/bin/bash
[ -n "${JAX_PLATFORMS:-}" ] || exit 9
trap 'echo saving; sleep 0.2; exit 143' TERM
echo "$@" | tee -a {home}/ran
until [ -e {home}/go ]; do sleep 0.05; done
echo done; exit 5
"""
REMOTE = """case "${0##*/} $4" in
  git*) tar -czf "${3#*=}" --files-from=/dev/null ;;
  gcloud*scp) cp "$5" "$HOME/${6#*:}" ;;
  gcloud*ssh) cd "$HOME"; for word; do case "$word" in --command=*) bash -c "${word#*=}" ;; esac; done ;;
esac"""


@pytest.fixture
def pod(launch, repository, tmp_path):
    """A slice of one worker, whose home is a folder here: gcloud's ssh runs the command in it."""
    home = tmp_path / "home"
    shutil.copytree(repository, home / "align_jax")
    (home / "align_jax" / ".venv" / "bin").mkdir(parents=True)
    (home / "align_jax" / ".venv" / "bin" / "activate").write_text(f"PATH={tmp_path}/venv:$PATH\n")
    fake(tmp_path / "venv", "python", program=STAND_IN.replace("{home}", str(home)))
    for name in ("bash", "sleep"):
        (tmp_path / "tools" / name).unlink()
    there = (f"HOME={home}", f"TMPDIR={tmp_path}", "HOSTNAME=worker-0")
    yield lambda *words: launch("tpu.sh", *words, *there, on_call=REMOTE)
    (home / "go").touch()  # nothing that was started outlives this


def test_a_command_is_followed_to_its_end_and_its_exit_status_is_told(pod, tmp_path):
    (tmp_path / "home" / "go").touch()
    done = pod("run", *COMMAND)
    assert done.returncode == 5
    assert done.stdout.splitlines() == ["worker-0: started", " ".join(COMMAND[1:]), "done"]
    assert "error: exit status 5 of: gcloud compute tpus tpu-vm ssh pod" in done.stderr
    assert pod("status").stdout.splitlines() == ["worker-0: ended with exit status 5: done"]


def test_a_command_outlives_the_connection_and_is_not_started_twice(pod, tmp_path):
    assert pod("status").stdout == "worker-0: nothing was started\n"
    assert pod("log").returncode == 1
    following = subprocess.Popen(
        ["/bin/bash", tmp_path / "repo" / "launch" / "tpu.sh", "run", *COMMAND], stdout=subprocess.PIPE, text=True,
        stderr=subprocess.DEVNULL, start_new_session=True, env=SETTINGS | {
            "PATH": f"{tmp_path}/tools:/usr/bin:/bin", "CALLS": str(tmp_path / "calls"), "ON_CALL": REMOTE,
            "HOME": str(tmp_path / "home"), "HOSTNAME": "worker-0"})
    assert following.stdout.readline() == "worker-0: started\n"
    assert following.stdout.readline() == " ".join(COMMAND[1:]) + "\n"
    os.killpg(following.pid, signal.SIGKILL)  # the connection is lost; a hang-up is ignored where the tests' own is
    following.communicate()
    again = pod("run", *COMMAND)
    assert again.returncode == 1
    assert "error: worker worker-0: a command is running here: launch/tpu.sh log follows it" in again.stderr
    assert pod("status").stdout.startswith("worker-0: running: -m align_jax.train")
    assert (tmp_path / "home" / "ran").read_text().count("\n") == 1

    pod("stop")
    stopped = pod("log")
    assert (stopped.returncode, stopped.stdout.splitlines()[-1]) == (143, "saving")  # it had the time to save
    (tmp_path / "home" / "go").touch()
    assert pod("run", *COMMAND).returncode == 5  # the same command, once more


def test_a_command_that_was_killed_is_not_taken_for_one_that_ended(pod, tmp_path):
    here = tmp_path / "home" / "align_jax" / ".worker"
    (tmp_path / "home" / "go").touch()
    pod("run", *COMMAND)
    (here / "exit").unlink()  # as after a reboot
    assert "ended with exit status unknown, it was killed" in pod("status").stdout
    assert "the command was killed" in pod("log").stderr


@pytest.mark.parametrize("shared, mounted", [
    ("gs://bucket", ["gcsfuse", "--implicit-dirs", "--metadata-cache-ttl-secs=0",
                     "--metadata-cache-negative-ttl-secs=0", "bucket", "runs"]),
    ("10.0.0.2:/share", ["sudo", "mount", "-t", "nfs", "-o", "lookupcache=positive,actimeo=1", "10.0.0.2:/share",
                         "runs"]),
    ("", None),
])
def test_a_worker_is_installed_and_mounts_the_shared_folder(shared, mounted, pod, tmp_path):
    fake(tmp_path / "tools", "python3", "gcsfuse", "sudo", "mountpoint")
    (tmp_path / "tools" / "mountpoint").write_text(FAKE + f"[ -e {tmp_path}/mounted ]\n")
    done = pod("install", f"SHARED={shared}", "TYPE=v5litepod-8")
    assert done.returncode == 0, done.stderr
    assert ["venv tpu"] in calls(tmp_path)
    assert [words for words in calls(tmp_path) if words == mounted] == [mounted] * bool(shared)
    assert (tmp_path / "home" / "align_jax" / "runs").is_dir()

    (tmp_path / "home" / "go").touch()
    if shared:  # after a reboot runs/ would be a folder of this worker alone
        refused = pod("run", *COMMAND)
        assert refused.returncode == 1
        assert "runs/ is not mounted: launch/tpu.sh install does it again" in refused.stderr
        (tmp_path / "mounted").touch()
    assert pod("run", *COMMAND).returncode == 5
    count = len([words for words in calls(tmp_path) if words == mounted])
    pod("install", f"SHARED={shared}", "TYPE=v5litepod-8")
    assert len([words for words in calls(tmp_path) if words == mounted]) == count  # what is mounted stays


# -- in a SLURM job ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("status", [0, 7])
def test_a_job_runs_the_command_on_every_node_and_ends_as_it_does(status, tmp_path):
    fake(tmp_path / "tools", "srun", "scontrol", "scancel")
    done = subprocess.run(
        ["/bin/bash", ROOT / "launch" / "slurm_job.sh", *COMMAND], capture_output=True, text=True, timeout=30,
        env={"PATH": f"{tmp_path}/tools:/usr/bin:/bin", "CALLS": str(tmp_path / "calls"), "SLURM_JOB_ID": "12",
             "ON_CALL": f'echo "$JAX_PLATFORMS"; exit {status}'})
    assert (done.returncode, done.stdout) == (status, "cuda\n")
    assert calls(tmp_path) == [["srun", "--kill-on-bad-exit=1", *COMMAND]]  # what fails by itself does not come back


@pytest.mark.parametrize("tasks, nodes, said", [
    (2, 2, {"local_device_ids": [0, 1, 2, 3]}),  # jax would take one
    (8, 2, {}),  # jax gives every process the GPU of its number on the node
])
def test_the_processes_of_a_node_share_its_gpus(tasks, nodes, said, monkeypatch):
    started = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **settings: started.append(settings))
    for name in [name for name in os.environ if name.startswith(("SLURM_", "JAX_COORDINATOR"))]:
        monkeypatch.delenv(name)
    for name, value in {"STEP_NUM_TASKS": tasks, "STEP_NUM_NODES": nodes, "GPUS_ON_NODE": 4}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    mesh.start_hosts()
    assert started == [said]


def test_a_host_without_an_address_is_refused(monkeypatch):
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS", raising=False)
    monkeypatch.setenv("JAX_PROCESS_ID", "1")
    with pytest.raises(ValueError, match=r"hosts: got {'JAX_PROCESS_ID': '1'}, expected JAX_COORDINATOR_ADDRESS="):
        mesh.start_hosts()


def test_the_quickstart_says_what_it_would_do():
    told = subprocess.run(["/bin/bash", "launch/quickstart.sh", "--config.seed=1", "--dry_run"], cwd=ROOT, check=True,
                          capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"}).stdout
    assert told.splitlines() == ["source tools/venv.sh", "export JAX_PLATFORMS=cpu",
                                 "python -m align_jax.study --config=configs/quickstart.py --config.seed=1"]


def test_a_job_whose_time_is_up_saves_and_goes_back_into_the_queue(tmp_path):
    fake(tmp_path / "tools", "srun", "scontrol", "scancel")
    on_call = f"""case "${{0##*/}}" in
      srun) echo up; until [ -e {tmp_path}/term ]; do sleep 0.05; done; sleep 0.3; echo saved; exit 143 ;;
      scancel) touch {tmp_path}/term ;;
    esac"""
    job = subprocess.Popen(
        ["/bin/bash", ROOT / "launch" / "slurm_job.sh", *COMMAND], stdout=subprocess.PIPE, text=True,
        env={"PATH": f"{tmp_path}/tools:/usr/bin:/bin", "CALLS": str(tmp_path / "calls"), "SLURM_JOB_ID": "12",
             "ON_CALL": on_call})
    assert job.stdout.readline() == "up\n"
    job.send_signal(signal.SIGUSR1)
    assert job.communicate(timeout=30)[0] == "saved\n"
    assert job.returncode == 143
    assert calls(tmp_path)[1:] == [["scancel", "--signal=TERM", "12"], ["scontrol", "requeue", "12"]]


# -- the page ------------------------------------------------------------------------------------------------

README = (ROOT / "launch" / "README.md").read_text()


def test_the_page_shows_calls_that_work(launch):
    shown = re.findall(r"^launch/(\w+\.sh) ([^#\n]*)", README, re.MULTILINE)
    assert {script for script, _ in shown} == {"gpu.sh", "slurm.sh", "tpu.sh", "xpk.sh"}
    for script, words in shown:
        done = launch(script, "--dry_run", *shlex.split(words))
        assert done.returncode == 0, f"{script} {words}: {done.stderr}"


def test_the_page_names_every_action_and_only_files_that_exist():
    wanted = re.search("got '', expected (.*)", WRONG["tpu.sh",])[1]
    assert not [action for action in re.findall(r"\w+", wanted) if action != "or"
                and not re.search(rf"(`|launch/tpu.sh ){action}\b", README)]
    assert all((ROOT / path).exists() for path in re.findall(r"(?:launch|configs)/\w+\.\w+", README))

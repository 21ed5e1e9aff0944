"""The walls: what they let through, what they hold (gate R8: the whole escape suite), and what comes of their own failures."""

import concurrent.futures
import contextlib
import os
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import ROOT

from experiments.benchmarks.isolation_attacks import WALLS, open_host, program, run_attack, run_suite_as
from experiments.benchmarks.isolation_programs import ATTACKS
from lfm_jax.isolation import NoWall, ProgramLimits, WallFailed, find_wall, interpreter, run_python, supervisor
from lfm_jax.isolation import wall as wall_module
from lfm_jax.isolation.bubblewrap import Bubblewrap
from lfm_jax.isolation.landlock import Landlock
from lfm_jax.isolation.plan import Plan
from lfm_jax.isolation.wall import defect

AS_ANOTHER = ("fork bomb", "forks that flee", "other processes", "write outside", "memory of many", "deleted files", "daemons")
NAME_IT = "import ctypes; ctypes.CDLL(None).prctl(15, b'{}', 0, 0, 0)\n"


@pytest.fixture(scope="module", params=list(WALLS))
def wall(request):
    why = defect(WALLS[request.param])
    # What the machine lacks: the wall itself, or that its users may make namespaces.
    lacks_namespaces = "did not start" in why and ("namespace" in why or "uid map" in why)
    if WALLS[request.param].missing() or lacks_namespaces:
        pytest.skip(f"{request.param}: {why}")
    assert why == ""
    return WALLS[request.param]


class NoWallAtAll:
    """Starts programs with nothing around them; `command` comes before the interpreter."""

    name = "nothing"

    def __init__(self, *command: str):
        self.command = list(command)

    def missing(self) -> str:
        return ""

    @contextlib.contextmanager
    def plan(self, folder, python):
        with open(os.devnull, "rb") as nothing:
            yield Plan(command=[*self.command, interpreter.executable_in(python)], filter=nothing.fileno())

    def started(self, folder) -> bool:
        return True


@pytest.fixture
def boxes(monkeypatch):
    """Where the folders of the programs are, and nothing else."""
    folder = Path(tempfile.mkdtemp(prefix="boxes_"))
    folder.chmod(0o755)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    folder.rmdir()


@pytest.fixture
def fresh_search():
    find_wall.cache_clear()
    yield
    find_wall.cache_clear()


def test_a_program_says_what_it_says(wall):
    outcome = run_python("import sys; print(input()); print('ä', file=sys.stderr); sys.exit(3)", stdin="one\ntwo", wall=wall)
    assert (outcome.reason, outcome.exit_code, outcome.stdout, outcome.stderr) == ("finished", 3, "one\n", "ä\n")
    assert 0 < outcome.seconds < 10


@pytest.mark.parametrize(
    ("source", "code"),
    [("pass", 0), ("1 / 0", 1), ("import os; os.abort()", 134), ("import os; os.kill(os.getpid(), 9)", 137), ("é = '\ud800'", 1)],
)
def test_the_exit_code_is_a_shell_s(wall, source, code):
    outcome = run_python(source, wall=wall)
    assert (outcome.reason, outcome.exit_code) == ("finished", code)


def test_files_can_be_imported_and_read(wall):
    files = {"solution.py": "def double(x):\n    return 2 * x\n", "data/bytes": b"\xff\x00"}
    source = "import solution; print(solution.double(21), open('data/bytes', 'rb').read(), open('new', 'w').write('abc'))"
    assert run_python(source, files=files, wall=wall).stdout == "42 b'\\xff\\x00' 3\n"


def test_ordinary_programs_run(wall):
    """What the filter and the limits must leave alone."""
    source = """
import asyncio, concurrent.futures, decimal, hashlib, json, random, shutil, sqlite3, subprocess, tempfile, threading, time, zlib
async def main():
    process = await asyncio.create_subprocess_exec("echo", "hello", stdout=asyncio.subprocess.PIPE)
    return (await process.communicate())[0], await asyncio.gather(*(asyncio.sleep(0.01, index) for index in range(3)))
print(asyncio.run(main()))
with concurrent.futures.ThreadPoolExecutor(16) as pool:
    print(sum(pool.map(lambda x: x * x, range(100))))
print(subprocess.run("echo one | tr a-z A-Z; exit 3", shell=True, capture_output=True, text=True))
with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as file, open(f"{folder}/a", "w") as other:
    print(file.write(b"x"), other.write("y"))
    shutil.copyfile(f"{folder}/a", "b")
with sqlite3.connect("database") as connection:
    print(connection.execute("create table t (x)").connection.execute("insert into t values (1)").rowcount)
process = subprocess.Popen(["sleep", "60"])
process.terminate()
print(process.wait(), len(set(range(5))), {"b", "a", "c"})
"""
    outcome = run_python(source, wall=wall)
    assert outcome.stderr == ""
    assert outcome.stdout.splitlines()[:2] == ["(b'hello\\n', [0, 1, 2])", "328350"]
    assert "returncode=3, stdout='ONE\\n', stderr=''" in outcome.stdout
    assert outcome.stdout == run_python(source, wall=wall).stdout  # sets are in the same order, too


@pytest.mark.skipif(bool(Landlock().missing()), reason=Landlock().missing())
def test_behind_landlock_a_program_s_own_files_are_not_executed():
    """One that may be executed and not read would hide from the guard what it writes."""
    source = """
import os, shutil, subprocess
os.close(os.open("echo", os.O_CREAT | os.O_WRONLY, 0o755))
shutil.copyfile("/bin/echo", "echo")
subprocess.run(["./echo", "executed"])
"""
    outcome = run_python(source, wall=Landlock())
    assert "executed" not in outcome.stdout and "PermissionError" in outcome.stderr


def test_many_run_at_a_time(wall):
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        said = pool.map(lambda index: run_python(f"import os; os.fork(); print({index})", wall=wall).stdout, range(12))
    assert [text.split()[0] for text in said] == [str(index) for index in range(12)]


def test_output_is_cut_where_the_limit_is(wall):
    outcome = run_python("import sys; print('x' * 5000); sys.stdout.flush(); print('y' * 5000, file=sys.stderr)",
                         limits=ProgramLimits(output_bytes=6000), wall=wall)  # fmt: skip
    assert outcome.reason == "output_bytes"
    assert (len(outcome.stdout + outcome.stderr), outcome.stdout) == (6000, "x" * 5000 + "\n")


def test_what_the_kernel_says_of_a_program(wall):
    """No new privileges, a filter, no capabilities, no groups, and as root a user that nobody else is; read from outside."""
    mark, groups = f"k{os.getpid()}", os.getgroups()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        if os.geteuid() == 0:
            os.setgroups([4, 24])  # a group of ours must not be one of the program's
        try:
            run = pool.submit(run_python, NAME_IT.format(mark) + "while True: pass", wall=wall)
            status = _status_of(mark, run)
        finally:
            if os.geteuid() == 0:
                os.setgroups(groups)
        os.kill(int(status["pid"]), signal.SIGKILL)
        assert (run.result().reason, run.result().exit_code) == ("finished", 137)
    assert (status["NoNewPrivs"], status["Seccomp"], int(status["CapEff"], 16), int(status["CapPrm"], 16)) == ("1", "2", 0, 0)
    if os.geteuid() == 0:
        assert status["Groups"] == ""
        assert {int(user) for user in status["Uid"].split()} != {0} and int(status["Uid"].split()[0]) >= 10_000


def _status_of(mark: str, run: concurrent.futures.Future) -> dict[str, str]:
    while not run.done():
        for path in Path("/proc").glob("[0-9]*/status"):
            with contextlib.suppress(OSError):
                status = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
                if status["Name"].strip() == mark:
                    return {name: value.strip() for name, value in status.items()} | {"pid": path.parent.name}
    raise AssertionError(f"the program was never seen: {run.result()}")


def test_a_killed_supervisor_takes_the_program_along_and_is_no_outcome(wall, boxes):
    mark = f"s{os.getpid()}"
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        run = pool.submit(run_python, NAME_IT.format(mark) + "while True: pass", wall=wall)
        status = _status_of(mark, run)
        program = os.pidfd_open(int(status["pid"]))
        pid = int(status["pid"])
        while b"supervisor" not in Path(f"/proc/{pid}/cmdline").read_bytes():
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(WallFailed, match="its supervisor was killed"):
            run.result()
    assert select.select([program], [], [], 30)[0], "the program is still there"
    os.close(program)


def test_when_we_are_killed_everything_ends(wall, boxes):
    mark = f"p{os.getpid()}"
    source = f"""
import sys, tempfile
sys.path.insert(0, {str(ROOT)!r})
tempfile.tempdir = {str(boxes)!r}
from experiments.benchmarks.isolation_attacks import WALLS, open_host, program, run_attack, run_suite_as
from experiments.benchmarks.isolation_programs import ATTACKS
from lfm_jax.isolation import ProgramLimits, run_python
program = {NAME_IT.format(mark)!r} + "import os; os.fork(); open('x', 'w').close()\\nwhile True: pass"
run_python(program, limits=ProgramLimits(seconds=600, cpu_seconds=600), wall=WALLS[{wall.name!r}])
"""
    with concurrent.futures.ThreadPoolExecutor(1) as pool, subprocess.Popen([sys.executable, "-c", source]) as ours:
        pid = int(_status_of(mark, pool.submit(ours.wait))["pid"])
        descriptors = [os.pidfd_open(pid)]
        while pid != ours.pid:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            descriptors.append(os.pidfd_open(pid))
        ours.kill()
    for descriptor in descriptors:
        assert select.select([descriptor], [], [], 30)[0], "a process is still there"
        os.close(descriptor)
    assert list(boxes.iterdir()) == []


def test_it_does_not_matter_that_we_wait_for_no_child(wall):
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        outcome = run_python("import os; print(os.fork() and os.wait()[1])", wall=wall)
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert (outcome.reason, outcome.exit_code, outcome.stdout.split()) == ("finished", 0, ["0", "0"])


def test_a_wall_that_does_not_start_is_no_outcome(boxes):
    with pytest.raises(WallFailed, match="nothing did not start: FileNotFoundError"):
        run_python("print(1)", wall=NoWallAtAll("/no/such/wall"))


@pytest.mark.skipif(bool(Bubblewrap().missing()), reason=Bubblewrap().missing())
def test_an_error_of_bubblewrap_is_not_taken_for_the_program_s(boxes, monkeypatch):
    monkeypatch.setattr(interpreter, "DEVICES", ("/dev/no_such_device",))
    with pytest.raises(WallFailed, match="bubblewrap did not start: bwrap: .*no_such_device"):
        run_python("print(1)", wall=Bubblewrap())
    assert "no_such_device" in defect(Bubblewrap())


def test_what_starts_and_does_not_hold_is_no_wall():
    why = defect(NoWallAtAll())
    assert "it starts and does not hold" in why and "files" in why and "sockets" in why


def test_the_first_wall_without_a_defect_is_taken_and_tried_once(monkeypatch, fresh_search):
    tried = []
    monkeypatch.setattr(wall_module, "defect", lambda wall: tried.append(wall.name) or "broken" * (wall.name == "bubblewrap"))
    assert find_wall().name == find_wall().name == "landlock"
    assert tried == ["bubblewrap", "landlock"]


def test_without_a_wall_nothing_is_run(monkeypatch, fresh_search):
    monkeypatch.setattr(Bubblewrap, "missing", lambda self: "bwrap is not installed")
    monkeypatch.setattr(Landlock, "missing", lambda self: "the kernel has no landlock")
    with pytest.raises(NoWall, match="bwrap is not installed.*the kernel has no landlock.*Install bubblewrap"):
        run_python("print(1)")


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("lfm_jax.isolation.landlock.version", lambda: 0)
    assert "apt-get install bubblewrap" in Bubblewrap().missing()
    assert "CONFIG_SECURITY_LANDLOCK" in Landlock().missing()


@pytest.mark.parametrize("name", ["/etc/x", "../x", "a/../../x", "main.py", "./main.py", "."])
def test_files_stay_in_the_folder(name, boxes):
    with pytest.raises(ValueError, match="files must have names below the program's folder"):
        run_python("pass", files={name: ""}, wall=NoWallAtAll())


def test_limits_that_nothing_can_keep_are_refused():
    with pytest.raises(ValueError, match="seconds must be positive, got 0"):
        ProgramLimits(seconds=0)
    with pytest.raises(ValueError, match="memory_bytes is 1048576, and Python does not start below"):
        ProgramLimits(memory_bytes=1 << 20)


def test_programs_get_users_that_nobody_is():
    whole = "         0          0 4294967295\n"
    assert supervisor.user_for(5, whole) == 0x70000005
    rootless = "         0       1000          1\n         1     100000      65536\n"
    assert {supervisor.user_for(pid, rootless) for pid in (1, 70_000, 4_000_000)} <= set(range(10_000, 65_534))
    with pytest.raises(OSError, match="this container has 1 user ids"):
        supervisor.user_for(5, "0 1000 1\n")


def test_a_folder_is_removed_whatever_is_in_it(tmp_path):
    kept, folder = tmp_path / "kept", tmp_path / "folder"
    kept.mkdir()
    (kept / "file").write_text("kept")
    (folder / "a" / "b").mkdir(parents=True)
    (folder / "a" / "b" / "c").write_text("x")
    (folder / "link").symlink_to(kept)
    (folder / "a" / "link").symlink_to(kept)
    (folder / ".1").write_text("x")
    os.chmod(folder / "a" / "b", 0)
    top = os.getcwd()
    os.chdir(folder)
    try:
        for _ in range(1500):
            os.mkdir("d")
            os.chdir("d")
    finally:
        os.chdir(top)
    supervisor.remove(folder)
    assert [path.name for path in tmp_path.rglob("*")] == ["kept", "file"]
    supervisor.remove(folder)  # gone is gone


@pytest.fixture
def host():
    with open_host() as host:
        yield host


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_an_attack_is_held(attack, wall, host):
    verdict = run_attack(attack, host, wall)
    assert verdict.breaches == []


def test_the_attacks_are_held_when_an_ordinary_user_runs_them(wall):
    if os.geteuid() != 0:
        pytest.skip("this is run by an ordinary user already")
    rows = run_suite_as(1000, wall.name, AS_ANOTHER)
    assert [row["attack"] for row in rows] == [attack.name for attack in ATTACKS if attack.name in AS_ANOTHER]
    assert [row for row in rows if row["breaches"]] == []


@pytest.mark.parametrize("attack", [attack for attack in ATTACKS if attack.bare], ids=lambda attack: attack.name)
def test_an_attack_succeeds_where_there_is_no_wall(attack, tmp_path, host):
    """Or its being held would say nothing. No test goes to the internet, so the addresses out there are taken for our own."""
    source = program(attack, host)
    for there, here in (("1.1.1.1", "127.0.0.1"), ("2606:4700:4700::1111", "::1"), ("example.com", "localhost")):
        source = source.replace(there, here)
    done = subprocess.run([sys.executable, "-c", source], cwd=tmp_path, capture_output=True, text=True)
    assert "BREACH" in done.stdout
    expected = {
        "network": ("loopback: ", "loopback by datagram: ", "unix stream: ", "unix datagram: ", "unix datagram out of a pair: ",
                    "abstract stream: ", "abstract datagram: ", "abstract datagram out of a pair: ", "server: "),
        "read outside": (f"read {host.home / 'secret'}: ", f"list {host.home}: ", "by another program: ", "list /proc: "),
        "environment": ("variable: ",),
        "links": ("by a link: ", "by a linked folder: ", "write by a link: ", "remove by a link: "),
    }  # fmt: skip
    assert [what for what in expected[attack.name] if f"BREACH: {what}" not in done.stdout] == []
    if attack.name in ("read outside", "environment", "links"):
        assert host.token in done.stdout
    if attack.name == "network":
        assert {breach.rpartition(" ")[2] for breach in host.breaches()} == set(host.sockets)
    if attack.name == "links":
        assert "files changed" in host.breaches()


def test_the_host_sees_what_is_left_behind(host):
    talks = ["sh", "-c", "echo started; read line", host.number]  # a process has no command line yet while it is started
    with subprocess.Popen(talks, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        box = tempfile.mkdtemp()
        try:
            process.stdout.readline()
            assert host.breaches() == [f"process {process.pid} is left", f"{box} is left"]
        finally:
            process.kill()


def test_an_attack_ends_for_a_limit_that_there_is():
    known = {"finished", *ProgramLimits.__dataclass_fields__}
    assert {reason for attack in ATTACKS for reason in attack.reasons} <= known

"""The programs of the escape suite (`isolation_attacks`): each says BREACH for what it managed, and "held" for what it met."""

import dataclasses

from lfm_jax.isolation.wall import ProgramLimits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attack:
    """source: what comes after PRELUDE. reasons: how it may end; finished, it must have run to its end (`exit_codes`).

    bare: whether it succeeds where there is no wall and no guard, and can be run there without harm.
    """

    name: str
    source: str
    limits: ProgramLimits = ProgramLimits(seconds=20, cpu_seconds=20)
    reasons: tuple[str, ...] = ("finished",)
    exit_codes: tuple[int, ...] = (0,)
    stdin: str = ""
    bare: bool = False


PRELUDE = """
import ctypes, errno, os, signal, socket, subprocess, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
libc.prctl(15, HOST["mark"].encode(), 0, 0, 0)  # its name, and that of whatever it leaves behind

def call(name, *arguments):
    result = libc.syscall(name, *arguments) if isinstance(name, int) else getattr(libc, name)(*arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result

def attempt(what, action):
    try:
        result = action()
    except (OSError, MemoryError, ValueError, LookupError) as error:
        print(f"held: {what}: {errno.errorcode.get(getattr(error, 'errno', None), type(error).__name__)}", flush=True)
    else:
        print(f"BREACH: {what}: {result!r:.200}", flush=True)

def output(*command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or not done.stdout:
        raise OSError(errno.EPERM, done.stderr)
    return done.stdout
"""

_NETWORK = """
def connect(family, kind, address):
    with socket.socket(family, kind) as made:
        made.settimeout(5)
        if kind == socket.SOCK_STREAM:
            made.connect(address)
        else:
            made.sendto(b"out", address)

def out_of_a_pair(address):
    with socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0] as made:
        made.sendto(b"out", address)

address = lambda name: HOST[name].replace("@", chr(0)) if isinstance(HOST[name], str) else HOST[name]
attempt("internet", lambda: connect(socket.AF_INET, socket.SOCK_STREAM, ("1.1.1.1", 53)))
attempt("internet by datagram", lambda: connect(socket.AF_INET, socket.SOCK_DGRAM, ("1.1.1.1", 53)))
attempt("internet 6", lambda: connect(socket.AF_INET6, socket.SOCK_STREAM, ("2606:4700:4700::1111", 53)))
attempt("names", lambda: socket.getaddrinfo("example.com", 80))
attempt("loopback", lambda: connect(socket.AF_INET, socket.SOCK_STREAM, address("tcp")))
attempt("loopback by datagram", lambda: connect(socket.AF_INET, socket.SOCK_DGRAM, address("udp")))
for kind in ("unix", "abstract"):
    attempt(kind + " stream", lambda: connect(socket.AF_UNIX, socket.SOCK_STREAM, address(kind + "_stream")))
    attempt(kind + " datagram", lambda: connect(socket.AF_UNIX, socket.SOCK_DGRAM, address(kind + "_datagram")))
    attempt(kind + " datagram out of a pair", lambda: out_of_a_pair(address(kind + "_datagram")))
attempt("raw", lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1))
attempt("packet", lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW))
attempt("netlink", lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW))
attempt("vsock", lambda: socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM))
attempt("kernel cryptography", lambda: socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET))
attempt("server", lambda: socket.create_server(("127.0.0.1", 0)))
"""

_READ = """
for path in ("/etc/shadow", "/etc/passwd", "/etc/hostname", "/proc/1/cmdline", "/proc/self/environ", "/proc/meminfo",
             f"/proc/{HOST['host']}/environ", f"/proc/{os.getppid()}/environ", "/sys/kernel/uevent_seqnum", "/dev/tty",
             "/dev/zero", HOST["secret"], HOST["file"], HOST["repository"]):
    attempt("read " + path, lambda: open(path).read(100))
for path in ("/root", "/home", "/proc", "/sys", "/var", "/etc/ssl", HOST["home"], os.path.dirname(HOST["repository"])):
    attempt("list " + path, lambda: os.listdir(path))
attempt("by another program", lambda: output("cat", HOST["secret"]))
attempt("by way of the folder above", lambda: open(os.path.join("..", "..", "..", "home", "secret")).read())
attempt("beside the folder", lambda: open("../stdin", "a"))
attempt("the filter", lambda: open("../filter", "r+b"))
"""

_WRITE = """
for folder in ("usr/lib", "usr/bin", "bin", "etc", "", "dev", "dev/shm", "tmp", "var/tmp", "run"):
    attempt("write in /" + folder, lambda: open(os.path.join("/", folder, "x"), "a").write("x"))
for path in (HOST["home"] + "/x", "../x", HOST["file"], os.path.dirname(os.__file__) + "/x.py", os.__file__, sys.executable):
    attempt("write " + path, lambda: open(path, "a").write("x"))
for path in (HOST["home"] + "/made", "/made", "/dev/made", "../made"):
    attempt("make " + path, lambda: os.mkdir(path))
kept = os.path.dirname(HOST["file"])
attempt("truncate", lambda: os.truncate(HOST["file"], 0))
attempt("remove", lambda: os.unlink(HOST["file"]))
attempt("move out", lambda: os.rename(HOST["file"], "stolen"))
attempt("move in", lambda: (open("own", "w").close(), os.rename("own", kept + "/own")))
attempt("link out", lambda: os.link(HOST["file"], "linked"))
attempt("link in", lambda: os.link("own", kept + "/own"))
attempt("symlink", lambda: os.symlink("own", kept + "/own"))
attempt("permissions", lambda: os.chmod(HOST["file"], 0o777))
attempt("permissions of a folder", lambda: os.chmod(HOST["home"], 0o777))
attempt("owner", lambda: os.chown(HOST["file"], os.getuid(), os.getgid()))
attempt("times", lambda: os.utime(HOST["file"], (0, 0)))
attempt("attributes", lambda: os.setxattr(HOST["file"], "user.x", b"x"))
attempt("permissions of the interpreter", lambda: os.chmod(os.__file__, 0o777))
"""

_ENVIRONMENT = """
attempt("variable", lambda: os.environ[HOST["variable"]])
print({**os.environ})
names = {"PATH", "LC_ALL", "PYTHONHASHSEED", "HOME", "TMPDIR", "PWD", "MALLOC_ARENA_MAX"}
if set(os.environ) - names:
    print("BREACH: variables", set(os.environ) - names)
"""

_PROCESSES = """
import fcntl, resource
victim, host = HOST["victim"], HOST["host"]
others = {"victim": victim, "host": host, "supervisor": os.getppid() if os.getppid() > 1 else host}
for name, pid in others.items():
    for number in (0, signal.SIGSTOP, signal.SIGKILL):
        attempt(f"signal {int(number)} to the {name}", lambda: os.kill(pid, number))
    attempt("signal by descriptor", lambda: signal.pidfd_send_signal(os.pidfd_open(pid), signal.SIGKILL))
    attempt("signal to a thread", lambda: call("tgkill", pid, pid, 9))
    attempt("trace", lambda: call("ptrace", 16, pid, 0, 0))
    attempt("seize", lambda: call("ptrace", 0x4206, pid, 0, 0))
    attempt("limits", lambda: resource.prlimit(pid, resource.RLIMIT_CPU, (1, 1)))
    attempt("cores", lambda: os.sched_setaffinity(pid, {min(os.sched_getaffinity(0))}) if pid else None)
    attempt("priority", lambda: os.setpriority(os.PRIO_PROCESS, pid, 19))
    attempt("scheduling", lambda: os.sched_setscheduler(pid, os.SCHED_BATCH, os.sched_param(0)))
    attempt("its files", lambda: os.listdir(f"/proc/{pid}/fd"))
    buffer = ctypes.create_string_buffer(8)
    vector = (ctypes.c_size_t * 2)(ctypes.addressof(buffer), 8)
    attempt("its memory", lambda: call("process_vm_readv", pid, vector, 1, vector, 1, 0))
attempt("signal to its group", lambda: os.killpg(victim, signal.SIGKILL))
attempt("priority of all of a user's", lambda: os.setpriority(os.PRIO_USER, 0, 19))
reader, writer = os.pipe()
attempt("signal when a file is ready", lambda: (fcntl.fcntl(reader, fcntl.F_SETOWN, victim), fcntl.fcntl(reader, 10, 9),
        fcntl.fcntl(reader, fcntl.F_SETFL, os.O_ASYNC), os.write(writer, b"x")))
attempt("trace a child", lambda: call("ptrace", 0, 0, 0, 0))
"""

_FORKS = """
while True:
    try:
        os.fork()
    except OSError:
        pass
"""

_HOPS = """
# Each lives until it has a child: whoever has read a number of a process finds that process gone.
for _ in range(4):
    if os.fork() == 0:
        while True:
            if os.fork():
                os._exit(0)
time.sleep(30)
"""

_THREADS = """
for _ in range(2000):
    try:
        threading.Thread(target=time.sleep, args=(30,), daemon=True).start()
    except RuntimeError:
        pass
time.sleep(30)
"""

_ONE_MEMORY = """
held = []
try:
    while True:
        held.append(b"x" * (32 << 20))
        if len(held) > 20:
            print("BREACH: held", len(held) * 32, "MiB")
            break
except MemoryError:
    count = len(held)
    held.clear()
    print("held: memory: MemoryError", count)
"""

_MANY_MEMORY = """
for _ in range(10):
    if os.fork() == 0:
        held = [b"x" * (8 << 20) for _ in range(20)]
        time.sleep(30)
time.sleep(10)
print("BREACH: 1,600 MiB in ten processes")
"""

_HIDDEN_MEMORY = """
import mmap
def shared(size=64 << 20):
    area = mmap.mmap(-1, size)
    area.write(b"x" * size)
    area.madvise(mmap.MADV_DONTNEED)
    return size

def file_in_memory():
    with open(os.memfd_create("x"), "wb") as file:
        return file.write(b"x" * (8 << 20))

def mapped(path, flags):
    with open(path, flags) as file:
        return mmap.mmap(file.fileno(), 1 << 20, mmap.MAP_SHARED)

attempt("shared", shared)
attempt("huge pages", lambda: mmap.mmap(-1, 2 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40000))
attempt("a file in memory", file_in_memory)
attempt("/dev/zero", lambda: mapped("/dev/zero", "r+b"))
with open("sparse", "wb") as file:
    file.truncate(1 << 20)
attempt("a mapped file", lambda: mapped("sparse", "r+b"))
attempt("segment", lambda: call("shmget", 0, 1 << 20, 0o1600))
attempt("queue", lambda: call("mq_open", b"/x", os.O_CREAT | os.O_RDWR, 0o600, None))
attempt("messages", lambda: call("msgget", 0, 0o1600))
attempt("/dev/shm", lambda: open("/dev/shm/x", "w").write("x"))
"""

_DISK = """
attempt("one file", lambda: [open("one", "ab").write(b"x" * (1 << 20)) for _ in range(20)])
for index in range(1000):
    with open(f"file{index}", "wb") as file:
        for _ in range(15):
            file.write(b"x" * (1 << 20))
print("BREACH: the disk is full")
"""

_DELETED = """
held = []
for index in range(1000):
    held.append(open("file", "wb"))
    os.unlink("file")
    child = os.fork()
    if child == 0:
        for _ in range(15):
            held[-1].write(b"x" * (1 << 20))
        held[-1].flush()
        os._exit(0)
    os.waitpid(child, 0)
print("BREACH: much lies in deleted files")
"""

_UNWAITED = """
attempt("children that nobody waits for", lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN))
with open("reserved", "wb") as file:
    attempt("reserve", lambda: call("fallocate", file.fileno(), 0, ctypes.c_long(0), ctypes.c_long(8 << 20)))
    attempt("reserve deleted", lambda: call("fallocate", file.fileno(), 1, ctypes.c_long(0), ctypes.c_long(8 << 20)))
reader, writer = os.pipe()
os.write(writer, b"x" * 4096)
with open("spliced", "wb") as file:
    attempt("splice", lambda: os.splice(reader, file.fileno(), 4096))
"""

_ENTRIES = """
for index in range(500_000):
    os.close(os.open(f"{index}", os.O_CREAT | os.O_WRONLY))
print("BREACH: half a million files")
"""

_DEEP = """
for index in range(20_000):
    os.mkdir("d")
    os.chdir("d")
time.sleep(1)
print("BREACH: twenty thousand folders deep")
"""

_LOCKED = """
for index in range(200):
    os.makedirs(f"a{index}/b", mode=0o700)
    open(f"a{index}/b/file", "w").close()
for index in range(200):
    for name in (f"a{index}/b/file", f"a{index}/b", f"a{index}"):
        try:
            os.chmod(name, 0)
        except PermissionError:
            pass
os.mkdir("made_so", mode=0)
"""

_NAMESPACES = """
clone = 56 if os.uname().machine == "x86_64" else 220
spaces = {"user": 0x10000000, "mount": 0x20000, "process": 0x20000000, "network": 0x40000000, "ipc": 0x8000000}
for name, flag in spaces.items():
    attempt(name + " namespace", lambda: call("unshare", flag))
    attempt("a child in a " + name + " namespace", lambda: call(clone, flag | 17, 0, 0, 0, 0))
attempt("clone3", lambda: call(435, (ctypes.c_uint64 * 11)(0x10000000), 88))
attempt("enter", lambda: call("setns", 0, 0))
attempt("mount", lambda: call("mount", b"x", b".", b"tmpfs", 0, None))
attempt("bind", lambda: call("mount", b"/", b".", None, 4096, None))
attempt("writable", lambda: call("mount", None, b"/", None, 4096 | 32, None))
attempt("unmount", lambda: call("umount2", b"/usr", 2))
attempt("new root", lambda: os.chroot("."))
attempt("pivot", lambda: call("pivot_root", b".", b"."))
for name, number in {"open_tree": 428, "move_mount": 429, "fsopen": 430, "fspick": 433, "mount_setattr": 442}.items():
    attempt(name, lambda: call(number, 0, 0, 0, 0, 0))
attempt("by another program", lambda: output("unshare", "-Ur", "id"))
"""

_CALLS = """
column = os.uname().machine == "aarch64"
numbers = {
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "add_key": (248, 217), "keyctl": (250, 219),
    "kexec_load": (246, 104), "init_module": (175, 105), "finit_module": (313, 273), "reboot": (169, 142), "swapon": (167, 224),
    "syslog": (103, 116), "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "acct": (163, 89), "kcmp": (312, 272),
    "personality": (135, 92), "inotify_init1": (294, 26), "fanotify_init": (300, 262), "sync": (162, 81), "io_setup": (206, 0),
    "seccomp": (317, 277), "io_uring_setup": (425, 425), "pidfd_getfd": (438, 438), "openat2": (437, 437), "later": (700, 700),
    "landlock": (444, 444),
}
for name, columns in numbers.items():
    attempt(name, lambda: call(columns[column], 0, 0, 0, 0, 0))
attempt("not to be looked at", lambda: call("prctl", 4, 0, 0, 0, 0))
attempt("foster parent", lambda: call("prctl", 36, 1, 0, 0, 0))
attempt("another group", lambda: os.setpgid(0, 0))
attempt("another session", os.setsid)
attempt("another user", lambda: os.setuid(0))
attempt("another group of users", lambda: os.setgroups([0]))
attempt("more memory", lambda: __import__("resource").setrlimit(__import__("resource").RLIMIT_AS, (-1, -1)))
"""

_OLD_NUMBERS = """
# socket, by its number for 32-bit programs, through the door of 32-bit programs
import mmap
if os.uname().machine == "x86_64":
    code = bytes.fromhex("53b867010000bb02000000b90100000031d2cd805bc3")
    area = mmap.mmap(-1, 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, 7)
    area.write(code)
    result = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(area)))()
    if result >= 0 or -result not in (1, 38):
        print("BREACH: a call by another number gave", result)
"""

_LOOP = """
while True:
    pass
"""

_SHORT_LIVED = """
while True:
    if os.fork() == 0:
        end = time.process_time() + 0.05
        while time.process_time() < end:
            pass
        os._exit(0)
    os.wait()
"""

_IDLE = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
while True:
    time.sleep(1)
"""

_OUTPUT = """
while True:
    os.write(DESCRIPTOR, b"x" * 65536)
"""

_DAEMON = """
for session in (True, False):
    if os.fork() == 0:
        if session:
            attempt("session", os.setsid)
        sys.stdout.flush()
        if os.fork() == 0:
            for descriptor in range(3):
                os.close(descriptor)
            if session:
                os.execvp("sleep", ["sleep", HOST["number"]])
            signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
            time.sleep(3600)
        os._exit(0)
    os.wait()
"""

_LINKS = """
os.symlink(HOST["secret"], "secret")
os.symlink(HOST["home"], "home")
os.symlink("/etc", "etc")
os.makedirs("folder/below")
os.symlink(HOST["home"] + "/kept", "folder/below/kept")
os.symlink("loop", "loop")
attempt("by a link", lambda: open("secret").read())
attempt("by a linked folder", lambda: open("home/secret").read())
attempt("list a linked folder", lambda: os.listdir("home"))
attempt("write by a link", lambda: open("folder/below/kept/file", "a").write("x"))
attempt("remove by a link", lambda: os.unlink("folder/below/kept/file"))
attempt("move the folder", lambda: os.rename(".", "../moved"))
attempt("put a link in its place", lambda: os.rename(os.getcwd(), os.getcwd() + "2"))
attempt("a device", lambda: os.mknod("device", 0o600 | 0o060000, os.makedev(254, 0)))
attempt("memory as a device", lambda: os.mknod("device", 0o600 | 0o020000, os.makedev(1, 1)))
"""

_SWAPS = """
# What counts and what removes must not follow a folder that becomes a link under its eyes.
if os.fork() == 0:
    while True:
        try:
            os.makedirs("x/y", exist_ok=True)
            os.rename("x", "z")
            os.symlink(HOST["home"], "x")
            os.unlink("x")
            os.rmdir("z/y")
            os.rmdir("z")
        except OSError:
            pass
time.sleep(1)
"""

_STDIN = """
count = sum(len(line) for line in sys.stdin)
if count != 30_000_000 or sys.stdin.read(1):
    print("BREACH: read", count)
attempt("write to it", lambda: os.write(0, b"x"))
attempt("open it anew", lambda: open("/proc/self/fd/0", "r+"))
attempt("open it by its device", lambda: open("/dev/stdin"))
"""

_DESCRIPTORS = """
for descriptor in range(3, 1024):
    try:
        os.fstat(descriptor)
    except OSError:
        continue
    print("BREACH: descriptor", descriptor)
print("held: descriptors: EBADF")
"""

_SETUID = """
for command in (["su", "-c", "id"], ["sudo", "-n", "id"], ["mount", "--bind", "/", "."], ["newgrp", "root"], ["pkexec", "id"]):
    attempt(command[0], lambda: output(*command))
attempt("become root", lambda: os.setresuid(0, 0, 0))
"""

_TERMINAL = """
import fcntl
for descriptor in range(3):
    attempt("type into it", lambda: fcntl.ioctl(descriptor, 0x5412, b"x"))
    attempt("the console's", lambda: fcntl.ioctl(descriptor, 0x541C, b"\\x03"))
    attempt("take it", lambda: fcntl.ioctl(descriptor, 0x540E, 1))
attempt("terminal", lambda: open("/dev/tty", "r+"))
attempt("another", lambda: open("/dev/ptmx", "r+"))
if any(map(os.isatty, range(3))):
    print("BREACH: there is a terminal")
"""

_SHORT = ProgramLimits(seconds=15, cpu_seconds=1)
_LITTLE_DISK = ProgramLimits(seconds=30, cpu_seconds=30, disk_bytes=4 << 20)
_SMALL = ProgramLimits(seconds=30, cpu_seconds=30, memory_bytes=512 << 20)

ATTACKS = (
    Attack(name="network", source=_NETWORK, bare=True),
    Attack(name="read outside", source=_READ, bare=True),
    Attack(name="write outside", source=_WRITE),
    Attack(name="environment", source=_ENVIRONMENT, bare=True),
    Attack(name="other processes", source=_PROCESSES),
    Attack(name="fork bomb", source=_FORKS, reasons=("processes",)),
    Attack(name="forks that flee", source=_HOPS, reasons=("processes", "cpu_seconds", "seconds"), limits=_SHORT),
    Attack(name="threads", source=_THREADS, reasons=("processes",)),
    Attack(name="memory of one", source=_ONE_MEMORY, limits=_SMALL, reasons=("finished", "memory_bytes")),
    Attack(name="memory of many", source=_MANY_MEMORY, limits=_SMALL, reasons=("memory_bytes",)),
    Attack(name="hidden memory", source=_HIDDEN_MEMORY),
    Attack(name="disk", source=_DISK, reasons=("disk_bytes",)),
    Attack(name="deleted files", source=_DELETED, reasons=("disk_bytes",)),
    Attack(name="uncounted writes", source=_UNWAITED),
    Attack(name="many files", source=_ENTRIES, limits=_LITTLE_DISK, reasons=("disk_bytes",)),
    Attack(name="deep folders", source=_DEEP, reasons=("disk_bytes",)),
    Attack(name="locked folders", source=_LOCKED, reasons=("finished", "disk_bytes")),
    Attack(name="namespaces and mounts", source=_NAMESPACES),
    Attack(name="system calls", source=_CALLS),
    Attack(name="another machine's numbers", source=_OLD_NUMBERS, exit_codes=(0, 128 + 11, 128 + 31)),
    Attack(name="endless loop", source=_LOOP, limits=_SHORT, reasons=("cpu_seconds",)),
    Attack(name="short-lived loops", source=_SHORT_LIVED, limits=_SHORT, reasons=("cpu_seconds",)),
    Attack(name="endless sleep", source=_IDLE, limits=ProgramLimits(seconds=1), reasons=("seconds",)),
    Attack(name="endless output", source=_OUTPUT.replace("DESCRIPTOR", "1"), reasons=("output_bytes",)),
    Attack(name="endless errors", source=_OUTPUT.replace("DESCRIPTOR", "2"), reasons=("output_bytes",)),
    Attack(name="daemons", source=_DAEMON),
    Attack(name="links", source=_LINKS, bare=True),
    Attack(name="links that change", source=_SWAPS, reasons=("finished", "cpu_seconds", "disk_bytes")),
    Attack(name="long input", source=_STDIN, stdin="x" * 30_000_000),
    Attack(name="descriptors", source=_DESCRIPTORS),
    Attack(name="programs of root", source=_SETUID),
    Attack(name="terminal", source=_TERMINAL),
)

"""The process between ours and a program behind a wall: starts it, watches what all its processes take, and ends them all.

It is a program of its own, `python -I -S supervisor.py name=value ... -- command`, and imports next to nothing, for it is started
with every run. It is the subreaper of the tree under it, and the tree is one process group that no member can leave (setsid and
setpgid are not among the system calls of `system_calls`): one signal ends all of it, a fork bomb included, and what is left is
waited for. On its standard input it finds out that our process has died; on its standard output it reports once, at the end.
"""

import ctypes
import os
import resource
import select
import sys
import time

_PERIOD_SECONDS = 0.02
# A file, a directory or a link takes about this much of a disk, however little is in it.
_ENTRY_BYTES = 4096
# Folders in folders in folders: beyond, each look would take longer than the last.
_MOST_DEPTH = 64
# Open files of a process: each could hold what is deleted on disk.
_MOST_OPEN_FILES = 64
# The guard sees the processes that are too many, and says so; a kernel's limit, a little higher, holds until it has looked.
_PROCESSES_BEYOND = 8
_CHUNK = 1 << 16
_KILL = 9
_SIGCHLD = 17
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 22, 36, 38
_SECCOMP_MODE_FILTER = 2
_LANDLOCK_RESTRICT_SELF = 446
_CLONE_NEWNS, _MS_BIND, _MS_REC, _MS_PRIVATE = 0x20000, 4096, 16384, 1 << 18
# Users that nobody is: beyond the ranges that systemd, containers and subordinate users are given (systemd, UIDS-GIDS).
_FIRST_USER, _USERS = 0x70000000, 1 << 22
_libc = ctypes.CDLL(None, use_errno=True)


class _Filter(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p)]


def main(arguments):
    """Runs the command and reports: a line "REASON CODE SECONDS BYTES_OF_STDOUT", then stdout, then stderr.

    REASON is "finished", the name of the limit that was hit, or "failed": then stderr is why the command was never started.
    """
    at = arguments.index("--")
    plan = dict(argument.split("=", 1) for argument in arguments[:at])
    try:
        report = _run(plan, arguments[at + 1 :])
    except Exception as error:  # whatever it is, who waits for the report must learn it
        report = ("failed", 0, 0.0, b"", f"{type(error).__name__}: {error}".encode())
    reason, code, seconds, out, err = report
    data = memoryview(f"{reason} {code} {seconds:.6f} {len(out)}\n".encode() + out + err)
    try:
        while data:
            data = data[os.write(1, data) :]
    except BrokenPipeError:  # nobody is left to tell, and nobody else removes the folder
        remove(plan["folder"])


def remove(folder):
    """Removes a folder and what a program left in it, at whatever depth and with whatever permissions; no process may be in it.

    Directories are moved up as they are met: neither the recursion nor a path gets longer than the system allows.
    """
    folder = os.fspath(folder)
    if not os.path.exists(folder):  # the supervisor has done it, for we seemed to be gone
        return
    moved, todo = 0, [folder]
    while todo:
        directory = todo.pop()
        os.chmod(directory, 0o700)
        with os.scandir(directory) as entries:
            found = list(entries)
        for entry in found:
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.path)
            elif directory == folder:
                todo.append(entry.path)
            else:
                os.chmod(entry.path, 0o700)  # to move it is to write to it
                moved += 1
                todo.append(f"{folder}/.{moved}")
                os.rename(entry.path, todo[-1])
        if directory != folder:
            os.rmdir(directory)
    os.rmdir(folder)


def user_for(pid, id_map):
    """A user id for the programs of the supervisor `pid`, one that no other process has; `id_map` is /proc/self/uid_map.

    Raises:
      OSError: the ids of this container are too few.
    """
    end = max(int(first) + int(count) for first, _, count in map(str.split, id_map.splitlines()))
    if end >= _FIRST_USER + _USERS:
        return _FIRST_USER + pid % _USERS
    first, end = 10_000, min(end, 65_534)
    if end <= first:
        raise OSError(f"this container has {end} user ids, and a program needs one of its own: give it 65536, or run as no root")
    return first + pid % (end - first)


def _check(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _run(plan, command):
    _check(_libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))
    # Where our parent ignores it, children would vanish without being waited for, and what they took with them.
    _libc.signal(_SIGCHLD, None)
    user = None
    if os.geteuid() == 0:
        with open("/proc/self/uid_map") as file:
            user = user_for(os.getpid(), file.read())
        _give(plan["box"], user)
    out, out_end = os.pipe()
    err, err_end = os.pipe()
    failure, failure_end = os.pipe()
    begin = time.monotonic()
    child, others = _fork(user)
    if child == 0:
        try:
            os.setsid()
            for descriptor, number in ((os.open(plan["stdin"], os.O_RDONLY), 0), (out_end, 1), (err_end, 2)):
                os.dup2(descriptor, number)
            _set_limits(plan, others)
            _confine(plan, user)
            os.execv(command[0], command)
        except BaseException as error:
            os.write(failure_end, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(127)
    for descriptor in (out_end, err_end, failure_end):
        os.close(descriptor)
    why = os.read(failure, _CHUNK)  # ends when the command has begun
    if why:
        _end(child)
        return "failed", 0, 0.0, b"", why
    return _watch(plan, child, begin, {out: bytearray(), err: bytearray()})


def _give(box, user):
    for directory, _, files in os.walk(box):
        for path in (directory, *(os.path.join(directory, name) for name in files)):
            os.chown(path, user, user)


def _fork(user):
    """(pid, others): others is a bound on the processes and threads that the program's user has beside the program.

    Nothing tells how many a user has, in other containers too. So the limit is set and doubled until a fork succeeds.
    """
    if user is not None:
        return os.fork(), 0
    hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]
    others = 64
    while True:
        limit = others if hard == resource.RLIM_INFINITY else min(others, hard)
        resource.setrlimit(resource.RLIMIT_NPROC, (limit, hard))
        try:
            return os.fork(), others
        except BlockingIOError:
            if limit == hard:
                raise
            others *= 2


def _set_limits(plan, others):
    wanted = {
        resource.RLIMIT_AS: int(plan["memory_bytes"]),
        resource.RLIMIT_FSIZE: int(plan["file_bytes"]),
        resource.RLIMIT_NPROC: others + int(plan["processes"]) + int(plan["wall_processes"]) + _PROCESSES_BEYOND,
        resource.RLIMIT_NOFILE: _MOST_OPEN_FILES,
        resource.RLIMIT_CORE: 1,  # with 0 a program that collects dumps is still started; core(5)
    }
    for which, value in wanted.items():
        hard = resource.getrlimit(which)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (value, value))
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")


def _confine(plan, user):
    """What has to be done from within: the user, and the wall where it is no program of its own."""
    if plan["bind"]:
        _check(_libc.unshare(_CLONE_NEWNS))
        _check(_libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None))
        source, target = (os.fsencode(path) for path in plan["bind"].split(":"))
        _check(_libc.mount(source, target, None, _MS_BIND, None))
    os.chdir(plan["box"])
    os.umask(0o077)
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    _check(_libc.prctl(_PR_SET_PDEATHSIG, _KILL, 0, 0, 0))
    if plan["ruleset"]:
        with open(int(plan["filter"]), "rb") as file:
            program = file.read()
        instructions = ctypes.create_string_buffer(program, len(program))
        _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        _check(_libc.syscall(_LANDLOCK_RESTRICT_SELF, int(plan["ruleset"]), 0))
        os.close(int(plan["ruleset"]))
        filter_ = _Filter(len(program) // 8, ctypes.addressof(instructions))
        _check(_libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(filter_), 0, 0))


def _watch(plan, child, begin, outputs):
    """Reads what the program says and looks at its processes until it has ended or passes a limit."""
    limit = {name: float(plan[name]) for name in ("seconds", "cpu_seconds", "memory_bytes", "disk_bytes", "output_bytes")}
    limit["processes"] = int(plan["processes"]) + int(plan["wall_processes"])
    limit["disk_bytes"] += _disk_bytes(plan["box"], float("inf"))  # the files it was given
    events = select.poll()
    ended = os.pidfd_open(child)
    for descriptor in (0, ended, *outputs):
        events.register(descriptor, select.POLLIN)
    reason, walk_at = "", 0.0
    look_at = begin + _PERIOD_SECONDS
    while not reason:
        now = time.monotonic()
        if now >= begin + limit["seconds"]:
            reason = "seconds"
        elif now >= look_at:
            reason = _exceeded(limit, child)
            if not reason and now >= walk_at:
                reason = "disk_bytes" if _disk_bytes(plan["box"], limit["disk_bytes"]) > limit["disk_bytes"] else ""
                walk_at = now + 5 * (time.monotonic() - now)  # a fifth of the time at most
            look_at = time.monotonic() + _PERIOD_SECONDS
        until = min(look_at, begin + limit["seconds"])
        ready = {} if reason else dict(events.poll(max(0.0, 1e3 * (until - time.monotonic()))))
        for descriptor in outputs.keys() & ready.keys():
            if not _read(outputs, descriptor):
                events.unregister(descriptor)
        if sum(map(len, outputs.values())) > limit["output_bytes"]:
            reason = "output_bytes"
        elif ended in ready:
            reason = "finished"
        elif 0 in ready:
            reason = "abandoned"  # our process is no more
    status = _end(child)
    seconds = time.monotonic() - begin
    for descriptor in outputs:
        while reason == "finished" and _read(outputs, descriptor):
            if sum(map(len, outputs.values())) > limit["output_bytes"]:
                reason = "output_bytes"
    code = os.waitstatus_to_exitcode(status)
    out, err = outputs.values()
    most = int(limit["output_bytes"])
    return reason, code if code >= 0 else 128 - code, seconds, bytes(out[:most]), bytes(err[: max(0, most - len(out))])


def _read(outputs, descriptor):
    data = os.read(descriptor, _CHUNK)
    outputs[descriptor] += data
    return len(data)


def _end(child):
    """Ends the program and every process it has started; returns its wait status once none of them is left."""
    try:
        os.killpg(child, _KILL)  # before it is waited for: as long as that is so, the number is its own
    except ProcessLookupError:
        os.kill(child, _KILL)  # it had no time for a group of its own
    status = None
    while True:
        try:
            pid, found = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return status
        if pid == child:
            status = found
        elif pid == 0:  # still dying, or one that the signal has not met
            for pid in _descendants():
                try:
                    os.kill(pid, _KILL)
                except ProcessLookupError:
                    pass
            time.sleep(0.001)


def _descendants():
    found, todo = [], [os.getpid()]
    while todo:
        pid = todo.pop()
        try:
            for task in os.listdir(f"/proc/{pid}/task"):
                with open(f"/proc/{pid}/task/{task}/children", "rb") as file:
                    todo += map(int, file.read().split())
        except (FileNotFoundError, ProcessLookupError):  # it, or one of its threads, has ended
            if pid == os.getpid():
                raise
        else:
            found.append(pid)
    return found[1:]


def _exceeded(limit, child):
    """The limit that the processes have passed together, "" if none. Of a page that several share each counts its own."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    memory, processes, seconds, written = 0, 0, usage.ru_utime + usage.ru_stime, _written(os.getpid())
    for pid in _descendants():
        try:
            with open(f"/proc/{pid}/status", "rb") as file:
                status = file.read()
            with open(f"/proc/{pid}/stat", "rb") as file:
                times = file.read().rpartition(b")")[2].split()[11:15]
            written += _written(pid)
        except (FileNotFoundError, ProcessLookupError):
            continue
        for name in (b"RssAnon:", b"RssShmem:", b"VmSwap:"):
            at = status.find(name)
            memory += 1024 * int(status[at + len(name) :].split(None, 1)[0]) if at >= 0 else 0
        at = status.find(b"Threads:")
        processes += int(status[at + 8 :].split(None, 1)[0])
        seconds += sum(map(int, times)) / os.sysconf("SC_CLK_TCK")
        if b"\nState:\tZ" in status and pid != child:
            try:
                os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:  # its own parent's to wait for
                pass
    found = {"memory_bytes": memory, "processes": processes, "cpu_seconds": seconds, "disk_bytes": written}
    return next((name for name, value in found.items() if value > limit[name]), "")


def _written(pid):
    """What a process has written, the children included that it has waited for."""
    try:
        with open(f"/proc/{pid}/io", "rb") as file:
            return int(file.read().partition(b"wchar:")[2].split(None, 1)[0])
    except PermissionError:  # it is ending, and is counted when it has been waited for; or it is still a part of bubblewrap
        return 0


def _disk_bytes(box, most):
    """What lies in the folder, as far as `most` goes; infinite if that cannot be said (too deep, or not to be read)."""
    total, todo = 0, [box]
    while todo and total <= most:
        directory = todo.pop()
        if directory.count("/") - box.count("/") > _MOST_DEPTH:
            return float("inf")
        try:
            with os.scandir(directory) as found:
                for entry in found:
                    total += _ENTRY_BYTES + 512 * entry.stat(follow_symlinks=False).st_blocks
                    if entry.is_dir(follow_symlinks=False):
                        todo.append(entry.path)
                    if total > most:
                        break
        except (FileNotFoundError, NotADirectoryError):
            continue  # removed while it was looked at
        except OSError:
            return float("inf")
    return total


if __name__ == "__main__":
    main(sys.argv[1:])
    os._exit(0)  # an interpreter takes its time to clear up

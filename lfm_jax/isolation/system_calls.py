"""The system calls that a program behind a wall has: a seccomp filter that lets those of a list through, and no others.

What is not on the list (sockets, namespaces, mounts, ptrace, keys, bpf, io_uring, and whatever later kernels offer) does not
exist for the program. Some are left out for the guard's sake (`supervisor`): whoever could leave the process group (setsid,
setpgid) would outlive the end; memory shared without a file, memfd, SysV segments and huge pages are in no process's resident
set; splice, fallocate and asynchronous writes are not counted as written; a parent that ignores SIGCHLD loses what its children
took.

A filter is a program for the classic BPF machine, see seccomp(2); of Linux's numbers those of x86-64 and of AArch64 are here.
"""

import struct
from collections.abc import Iterable

# name:number on x86-64:number on AArch64, which does not have the old ones (asm/unistd_64.h and asm-generic/unistd.h of Linux).
_ALWAYS = """
    read:0:63 write:1:64 open:2: openat:257:56 close:3:57 creat:85: stat:4: fstat:5:80 lstat:6: newfstatat:262:79
    statx:332:291 poll:7: ppoll:271:73 lseek:8:62 mprotect:10:226 munmap:11:215 brk:12:214 rt_sigprocmask:14:135
    rt_sigreturn:15:139 rt_sigpending:127:136 rt_sigtimedwait:128:137 rt_sigsuspend:130:133 sigaltstack:131:132 pread64:17:67
    pwrite64:18:68 readv:19:65 writev:20:66 preadv:295:69 pwritev:296:70 preadv2:327:286 pwritev2:328:287 access:21:
    faccessat:269:48 faccessat2:439:439 pipe:22: pipe2:293:59 select:23: pselect6:270:72 sched_yield:24:124 mremap:25:216
    msync:26:227 mincore:27:232 madvise:28:233 dup:32:23 dup2:33: dup3:292:24 pause:34: nanosleep:35:101
    clock_nanosleep:230:115 clock_gettime:228:113 clock_getres:229:114 gettimeofday:96:169 time:201: times:100:153 alarm:37:
    getitimer:36:102 setitimer:38:103 timer_create:222:107 timer_settime:223:110 timer_gettime:224:108
    timer_getoverrun:225:109 timer_delete:226:111 timerfd_create:283:85 timerfd_settime:286:86 timerfd_gettime:287:87
    getpid:39:172 gettid:186:178 getppid:110:173 getpgrp:111: getpgid:121:155 getsid:124:156 getuid:102:174 geteuid:107:175
    getgid:104:176 getegid:108:177 getgroups:115:158 getresuid:118:148 getresgid:120:150 capget:125:90 uname:63:160
    sysinfo:99:179 getcpu:309:168 getrlimit:97:163 setrlimit:160:164 getrusage:98:165 getpriority:140:141
    sched_getparam:143:121 sched_getscheduler:145:120 sched_get_priority_max:146:125 sched_get_priority_min:147:126
    sched_getaffinity:204:123 fork:57: vfork:58: execve:59:221 execveat:322:281 exit:60:93 exit_group:231:94 wait4:61:260
    waitid:247:95 set_tid_address:218:96 set_robust_list:273:99 get_robust_list:274:100 restart_syscall:219:128 futex:202:98
    membarrier:324:283 rseq:334:293 arch_prctl:158: umask:95:166 flock:73:32 fsync:74:82 fdatasync:75:83 ftruncate:77:46
    fadvise64:221:223 sendfile:40:71 copy_file_range:326:285 getdents:78: getdents64:217:61 getcwd:79:17 chdir:80:49
    fchdir:81:50 rename:82: renameat:264:38 renameat2:316:276 mkdir:83: mkdirat:258:34 rmdir:84: link:86: linkat:265:37
    unlink:87: unlinkat:263:35 symlink:88: symlinkat:266:36 readlink:89: readlinkat:267:78 statfs:137:43 fstatfs:138:44
    epoll_create:213: epoll_create1:291:20 epoll_ctl:233:21 epoll_wait:232: epoll_pwait:281:22 epoll_pwait2:441:441
    eventfd:284: eventfd2:290:19 signalfd4:289:74 close_range:436:436 pidfd_open:434:434 getrandom:318:278 recvfrom:45:207
    sendto:44:206 recvmsg:47:212 sendmsg:46:211 shutdown:48:210 getsockopt:55:209 setsockopt:54:208 getsockname:51:204
    getpeername:52:205
"""
_CONDITIONED = """
    mmap:9:222 clone:56:220 socketpair:53:199 ioctl:16:29 fcntl:72:25 prctl:157:167 prlimit64:302:261
    sched_setaffinity:203:122 rt_sigaction:13:134
"""
_SIGNALS = """
    kill:62:129 tkill:200:130 tgkill:234:131 rt_sigqueueinfo:129:138 rt_tgsigqueueinfo:297:240
"""
_METADATA = """
    truncate:76:45 chmod:90: fchmod:91:52 fchmodat:268:53 chown:92: fchown:93:55 lchown:94: fchownat:260:54 utime:132:
    utimes:235: futimesat:261: utimensat:280:88
"""
# Of a condition (argument, mask, values) the call's argument, masked, must be one of the values.
_ALL = 0xFFFFFFFF
_NAMESPACES = 0x7E020000  # CLONE_NEW*
_MAP_SHARED, _MAP_HUGETLB = 0x1, 0x40000
_AF_UNIX, _SOCK_STREAM, _SOCK_TYPE = 1, 1, 0xF
_PR_NAMES = (15, 16)
_SIGCHLD, _SIGNAL_NUMBERS = 17, 64
# Whether it is a terminal and how wide; bytes to read; close on exec and blocking. Not: to put characters into a terminal.
_TCGETS, _TIOCGWINSZ, _FIONREAD, _FIONBIO, _FIONCLEX, _FIOCLEX = 0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451
# Duplicates, flags and locks; not who gets a signal when a file is ready, nor leases.
_FCNTL = (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030, 1032)
_CONDITIONS = {
    "mmap": [(3, _MAP_SHARED | _MAP_HUGETLB, (0,))],
    "clone": [(0, _NAMESPACES, (0,))],
    "socketpair": [(0, _ALL, (_AF_UNIX,)), (1, _SOCK_TYPE, (_SOCK_STREAM,))],
    "ioctl": [(1, _ALL, (_TCGETS, _TIOCGWINSZ, _FIONREAD, _FIONBIO, _FIONCLEX, _FIOCLEX))],
    "fcntl": [(1, _ALL, _FCNTL)],
    "prctl": [(0, _ALL, _PR_NAMES)],
    "prlimit64": [(0, _ALL, (0,))],
    "sched_setaffinity": [(0, _ALL, (0,))],
    "rt_sigaction": [(0, _ALL, tuple(number for number in range(1, _SIGNAL_NUMBERS + 1) if number != _SIGCHLD))],
}
_MACHINES = {"x86_64": (0xC000003E, 1), "aarch64": (0xC00000B7, 2)}  # AUDIT_ARCH_*, column of the tables
_X32 = 0x40000000  # the bit of another set of numbers for the same machine
_FIRST_NEW = 424  # from here on every architecture has the same numbers, and libraries expect that a kernel may not have them yet
_EPERM, _ENOSYS = 1, 38
_LOAD, _AND, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x45, 0x06
_KILL, _ERROR, _ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data


def filter_program(machine: str, *, metadata: bool, signals: bool) -> bytes:
    """The filter as the kernel takes it, 8 bytes an instruction.

    Args:
      machine: as `platform.machine()` says.
      metadata: whether permissions, owners and times of files may be changed, which landlock does not restrict (landlock(7)).
      signals: whether signals may be sent; by whom to whom is then up to the kernel.

    Raises:
      ValueError: the numbers of this machine's system calls are not known.
    """
    if machine not in _MACHINES:
        raise ValueError(f"no table of system calls for {machine!r}; there are those of {', '.join(_MACHINES)}")
    architecture, column = _MACHINES[machine]
    program = [(_LOAD, 0, 0, _ARCHITECTURE), (_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, _NUMBER)]
    program += [(_ANY_BIT, 0, 1, _X32), (_RETURN, 0, 0, _KILL)]
    tables = _ALWAYS + (_METADATA if metadata else "") + (_SIGNALS if signals else "")
    for _, number in _calls(tables, column):
        program += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]
    for name, number in _calls(_CONDITIONED, column):
        block = [instruction for condition in _CONDITIONS[name] for instruction in _condition(*condition)]
        block.append((_RETURN, 0, 0, _ALLOW))
        program += [(_EQUAL, 0, len(block), number), *block]
    program += [(_AT_LEAST, 0, 1, _FIRST_NEW), (_RETURN, 0, 0, _ERROR | _ENOSYS), (_RETURN, 0, 0, _ERROR | _EPERM)]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def _calls(table: str, column: int) -> Iterable[tuple[str, int]]:
    for entry in table.split():
        fields = entry.split(":")
        if fields[column]:
            yield fields[0], int(fields[column])


def _condition(argument: int, mask: int, values: tuple[int, ...]) -> list[tuple[int, int, int, int]]:
    """Goes on behind itself if the lower half of the argument fits; the kernel looks at no more than that in any of these."""
    tests = [(_EQUAL, len(values) - index, 0, value) for index, value in enumerate(values)]
    return [(_LOAD, 0, 0, _ARGUMENTS + 8 * argument), (_AND, 0, 0, mask), *tests, (_RETURN, 0, 0, _ERROR | _EPERM)]

"""The filter, run on a machine for classic BPF that is written here, for both processors."""

import re
import struct
from pathlib import Path

import pytest

from lfm_jax.isolation import system_calls
from lfm_jax.isolation.system_calls import filter_program

ALLOWED, NOT_PERMITTED, UNKNOWN, KILLED = 0x7FFF0000, 0x50001, 0x50026, 0x80000000
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# Of asm/unistd_64.h and asm-generic/unistd.h.
NUMBERS = {
    "x86_64": dict(read=0, mmap=9, rt_sigaction=13, ioctl=16, socket=41, connect=42, socketpair=53, clone=56, kill=62, fcntl=72,
                   truncate=76, chmod=90, ptrace=101, setsid=112, prctl=157, mount=165, prlimit64=302, memfd_create=319, bpf=321),
    "aarch64": dict(read=63, mmap=222, rt_sigaction=134, ioctl=29, socket=198, connect=203, socketpair=199, clone=220, kill=129,
                    fcntl=25, truncate=45, chmod=53, ptrace=117, setsid=157, prctl=167, mount=40, prlimit64=261, memfd_create=279,
                    bpf=280),
}  # fmt: skip
NEW = dict(clone3=435, openat2=437, pidfd_send_signal=424, io_uring_setup=425)


def run(program: bytes, number: int, *arguments: int, architecture: int) -> int:
    """What the kernel would answer; seccomp(2), bpf(4)."""
    data = struct.pack("=iIQ6Q", number, architecture, 0, *(*arguments, *[0] * (6 - len(arguments))))
    instructions = list(struct.iter_unpack("=HBBI", program))
    at, accumulator = 0, 0
    while True:
        code, yes, no, value = instructions[at]
        at += 1
        if code == 0x20:
            (accumulator,) = struct.unpack_from("=I", data, value)
        elif code == 0x54:
            accumulator &= value
        elif code == 0x06:
            return value
        else:
            holds = {0x15: accumulator == value, 0x35: accumulator >= value, 0x45: bool(accumulator & value)}[code]
            at += yes if holds else no


@pytest.fixture(params=list(ARCHITECTURES))
def ask(request):
    program = filter_program(request.param, metadata=True, signals=True)

    def ask(name, *arguments):
        number = {**NUMBERS[request.param], **NEW}[name]
        return run(program, number, *arguments, architecture=ARCHITECTURES[request.param])

    return ask


def test_what_is_on_the_list_is_allowed_and_nothing_else(ask):
    assert {ask(name) for name in ("read", "kill", "truncate", "chmod")} == {ALLOWED}
    assert {ask(name) for name in ("socket", "connect", "ptrace", "setsid", "mount", "memfd_create", "bpf")} == {NOT_PERMITTED}
    assert {ask(name) for name in NEW} == {UNKNOWN}


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("mmap", [(0, 9, 3, 0x22), (0, 9, 1, 0x02)], [(0, 9, 3, 0x21), (0, 9, 1, 0x01), (0, 9, 3, 3), (0, 9, 3, 0x40022)]),
        ("clone", [(0x11,), (0x3D0F00,), (0x4111,)], [(0x10000011,), (0x20011,), (0x40000011,), (0x2000011,), (0x4000011,)]),
        ("socketpair", [(1, 1), (1, 1 | 0x80000)], [(1, 2), (1, 5), (2, 1), (16, 3), (1, 0x80002)]),
        ("ioctl", [(0, 0x5401), (1, 0x541B)], [(0, 0x5412), (0, 0x541C), (0, 0x540E), (0, 0x8901), (0, 0x1_0000_5412)]),
        ("fcntl", [(0, 1), (0, 1030)], [(0, 8), (0, 10), (0, 15), (0, 1024), (0, 1031), (0, 1 << 32 | 8)]),
        ("prctl", [(15,), (16,)], [(4,), (36,), (22,), (1,), (1 << 32 | 4,)]),
        ("prlimit64", [(0, 7)], [(1, 7), (0xFFFFFFFF, 7)]),
        ("rt_sigaction", [(2,), (16,), (18,), (64,)], [(17,), (0,), (65,), (1 << 32 | 17,)]),
    ],
)  # fmt: skip
def test_conditions(ask, name, good, bad):
    assert [arguments for arguments in good if ask(name, *arguments) != ALLOWED] == []
    assert [arguments for arguments in bad if ask(name, *arguments) != NOT_PERMITTED] == []


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_who_shares_a_user_with_others_changes_no_permissions_and_sends_no_signals(machine):
    program = filter_program(machine, metadata=False, signals=False)
    for name in ("chmod", "truncate", "kill"):
        assert run(program, NUMBERS[machine][name], architecture=ARCHITECTURES[machine]) == NOT_PERMITTED


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_another_set_of_numbers_ends_the_program(machine):
    program = filter_program(machine, metadata=True, signals=True)
    for architecture in {0x40000003, 0x40000028, *ARCHITECTURES.values()} - {ARCHITECTURES[machine]}:
        assert run(program, 0, architecture=architecture) == KILLED
    assert run(program, 0x40000000, architecture=ARCHITECTURES[machine]) == KILLED


def test_an_unknown_machine_is_named():
    with pytest.raises(ValueError, match="no table of system calls for 'mips'; there are those of x86_64, aarch64"):
        filter_program("mips", metadata=True, signals=True)


def test_numbers_are_those_of_the_kernel_s_headers():
    headers = (Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), Path("/usr/include/asm-generic/unistd.h"))
    if not all(header.exists() for header in headers):
        pytest.skip("the kernel's headers (Debian: linux-libc-dev) of an x86-64 machine are not installed")
    defined = [
        {name: int(number) for name, number in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", header.read_text())}
        for header in headers
    ]
    defined[1]["newfstatat"] = defined[1]["fstatat"]  # its name there, on 64-bit machines
    tables = system_calls._ALWAYS + system_calls._CONDITIONED + system_calls._SIGNALS + system_calls._METADATA
    for entry in tables.split():
        name, *columns = entry.split(":")
        assert [str(numbers.get(name, "")) for numbers in defined] == columns, name

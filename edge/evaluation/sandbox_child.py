"""The confined side of :mod:`edge.evaluation.sandbox`: a program of its own, without the rest of the package.

``python -I -S -B sandbox_child.py TOKEN CPU_SECONDS MEMORY_MB < PROGRAM`` confines itself, runs the program, and prints
the token with the word "passed" when that has come to its end. The modules that programs mostly use are imported first.

The system calls' numbers are Linux's [1]; the filter is classic BPF over ``struct seccomp_data`` [2].

[1] https://github.com/torvalds/linux/blob/master/include/uapi/asm-generic/unistd.h (aarch64),
    https://github.com/torvalds/linux/blob/master/arch/x86/entry/syscalls/syscall_64.tbl (x86_64)
[2] https://www.kernel.org/doc/html/latest/userspace-api/seccomp_filter.html
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import signal
import struct
import sys

_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP = 1, 38, 22
_SECCOMP_MODE_FILTER = 2
_CLONE_NEWIPC, _CLONE_NEWUSER, _CLONE_NEWNET = 0x08000000, 0x10000000, 0x40000000
_CLONE_THREAD = 0x00010000
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_OWNERS = 8
"""A bit that F_SETOWN, F_SETOWN_EX and F_SETSIG have: by them, input to a file would become a signal to anybody."""
_EPERM, _ENOSYS = 1, 38

# AUDIT_ARCH, the calls that are refused, those that are said not to exist (there is an older one that is watched), and
# (call, argument, bits) of those that are refused when the argument has one of the bits, or, for clone, lacks it.
_X86_64 = (
    0xC000003E,
    (
        41, 42, 43, 44, 46, 49, 50, 53, 288, 307,  # sockets
        57, 58, 59, 322,  # fork, vfork, execve, execveat
        62, 200, 234, 129, 297, 424,  # signals to others
        101, 310, 311, 312, 438, 298, 321, 323,  # ptrace, process_vm_*, kcmp, pidfd_getfd, perf, bpf, userfaultfd
        76, 77, 82, 83, 84, 85, 86, 87, 88, 90, 91, 92, 93, 94, 132, 133, 161, 188, 189, 190, 197, 198, 199, 235,
        258, 259, 260, 261, 263, 264, 265, 266, 268, 280, 285, 316, 319, 452,
        463, 466, 467, 469,  # what changes files
        165, 166, 155, 167, 168, 169, 170, 171, 175, 176, 313, 246, 320, 304,  # mounts, machine
        272, 308, 164, 227, 159, 305,  # namespaces, clocks
        105, 106, 113, 114, 117, 119, 122, 123, 116, 126, 157, 160, 302,  # identities, prctl, limits
        425, 426, 427, 428, 429, 430, 431, 432, 433, 442, 248, 249, 250,  # io_uring, new mounts, keys
        29, 30, 31, 64, 65, 66, 68, 69, 70, 71, 240, 241, 242, 243,  # shared memory, queues
    ),
    (435, 437),  # clone3, openat2
    ((2, 1, _WRITES), (257, 2, _WRITES), (72, 1, _OWNERS)),  # open, openat, fcntl
    56,  # clone
)  # fmt: skip
_AARCH64 = (
    0xC00000B7,
    (  # the same groups in the same order
        198, 199, 200, 201, 202, 203, 206, 211, 212, 242, 243, 269,
        221, 281,
        129, 130, 131, 138, 240, 424,
        117, 270, 271, 272, 438, 241, 280, 282,
        5, 6, 7, 14, 15, 16, 33, 34, 35, 36, 37, 38, 45, 46, 47, 52, 53, 54, 55, 88, 264, 276, 279, 285, 452,
        463, 466, 467, 469,
        39, 40, 41, 51, 105, 106, 273, 104, 294, 142, 161, 162, 224, 225, 265, 97, 268, 112, 170, 171, 266,
        143, 144, 145, 146, 147, 149, 151, 152, 159, 91, 167, 164, 261,
        425, 426, 427, 428, 429, 430, 431, 432, 433, 442, 217, 218, 219,
        180, 181, 182, 183, 186, 187, 188, 189, 190, 191, 192, 193, 194, 195, 196, 197,
    ),
    (435, 437),
    ((56, 2, _WRITES), (25, 1, _OWNERS)),
    220,
)  # fmt: skip
_MACHINES = {"x86_64": _X86_64, "aarch64": _AARCH64}


def confine(cpu_s: float, memory_mb: int) -> None:
    """Give everything up that computing does not need.

    Raises:
        OSError: the kernel refuses something that is indispensable.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    _prctl(libc, _PR_SET_PDEATHSIG, signal.SIGKILL)
    separated = libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET | _CLONE_NEWIPC) == 0
    if os.geteuid() == 0 and not separated:
        raise OSError("root stays root: there are no user namespaces")
    _limit(cpu_s, memory_mb)
    _prctl(libc, _PR_SET_NO_NEW_PRIVS, 1)
    _filter_calls(libc)


def _limit(cpu_s: float, memory_mb: int) -> None:
    seconds = max(1, round(cpu_s))
    for kind, value in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory_mb << 20),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 32),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (value, value))


def _filter_calls(libc: ctypes.CDLL) -> None:
    if platform.machine() not in _MACHINES:
        raise OSError(f"there is no filter of system calls for {platform.machine()}")
    program = _bpf(*_MACHINES[platform.machine()])
    code = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code))
    _prctl(libc, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, header)


def _bpf(
    arch: int, refused: tuple[int, ...], absent: tuple[int, ...], opens: tuple[tuple[int, int, int], ...], clone: int
) -> bytes:
    """The filter: instructions of (code, jump if true, jump if false, constant)."""
    load, equal, at_least, any_bit, ret = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill, error = 0x7FFF0000, 0x80000000, 0x00050000
    program = [(load, 0, 0, 4), (equal, 1, 0, arch), (ret, 0, 0, kill), (load, 0, 0, 0)]
    # x86's calls with 32-bit pointers have the same names under other numbers.
    program += [(at_least, 0, 1, 0x40000000), (ret, 0, 0, kill)]
    for number in refused:
        program += [(equal, 0, 1, number), (ret, 0, 0, error | _EPERM)]
    for number in absent:
        program += [(equal, 0, 1, number), (ret, 0, 0, error | _ENOSYS)]
    for number, argument, bits in opens:
        # Low halves of the arguments, 64 bits each from byte 16 on.
        program += [(equal, 0, 4, number), (load, 0, 0, 16 + 8 * argument), (any_bit, 0, 1, bits)]
        program += [(ret, 0, 0, error | _EPERM), (ret, 0, 0, allow)]
    program += [(equal, 0, 4, clone), (load, 0, 0, 16), (any_bit, 1, 0, _CLONE_THREAD)]
    program += [(ret, 0, 0, error | _EPERM), (ret, 0, 0, allow)]
    program += [(ret, 0, 0, allow)]
    return b"".join(struct.pack("HBBI", *instruction) for instruction in program)


def _prctl(libc: ctypes.CDLL, option: int, *arguments: int | bytes) -> None:
    values = [value if isinstance(value, bytes) else ctypes.c_ulong(value) for value in arguments]
    if libc.prctl(option, *values, *([ctypes.c_ulong(0)] * (4 - len(values)))) != 0:
        raise OSError(ctypes.get_errno(), f"prctl {option}: {os.strerror(ctypes.get_errno())}")


def main() -> None:
    """Run the program on standard input."""
    token, cpu_s, memory_mb = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
    sys.argv = ["program"]
    source = sys.stdin.buffer.read().decode()
    _import_common()
    try:
        confine(cpu_s, memory_mb)
    except OSError as error:
        os.write(1, f"{token} refused: {error}".encode())
        os._exit(1)
    status = _run(source)
    sys.stdout.flush()
    if status == 0:
        os.write(1, f"\n{token} passed".encode())
    os._exit(status)


def _run(source: str) -> int:
    try:
        exec(compile(source, "program", "exec"), {"__name__": "__main__"})  # noqa: S102 - what this file is for
    except BaseException as error:  # noqa: BLE001 - SystemExit too is not the end that is wanted
        text = " ".join(str(error).split())[:500]
        sys.stdout.write(f"{type(error).__name__}: {text}\n" if text else f"{type(error).__name__}\n")
        return 1
    return 0


def _import_common() -> None:
    """Read the modules that programs use while files are quick to open."""
    import bisect, collections, copy, functools, hashlib, heapq, itertools, math, random, re, statistics, string, typing  # noqa: E401, F401, PLC0415, I001 - for their effect


if __name__ == "__main__":
    main()

"""The script that `sandbox.py` starts: drops its own permissions, then runs an untrusted program.

It reads one JSON object from standard input and reports on an inherited file: the nonce, then
`passed`, `failed` or `refused`, then the reason. It needs only Python and its standard library.
"""

import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys
from collections.abc import Iterable, Sequence

OUTPUT = "printed.txt"  # the file in the program's folder that holds its printed output

# Linux: include/uapi/linux/{prctl,seccomp,bpf_common,audit,landlock,sched}.h
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_LOAD, _EQUAL, _SET, _RETURN = 0x20, 0x15, 0x45, 0x06  # ld abs, jeq, jset, ret
_ALLOW, _KILL, _FAIL = 0x7FFF0000, 0x80000000, 0x00050000
_EPERM, _ENOSYS = 1, 38
_NUMBER, _ARCH, _FIRST = 0, 4, 16  # offsets in struct seccomp_data; low half of an argument
_X32 = 0x40000000  # bit of the numbers by which x86-64 calls its 32-bit variants
_CLONE_THREAD, _CLONE_NEWUSER, _CLONE_NEWNET = 0x00010000, 0x10000000, 0x40000000
_RULE_PATH = 1

_CALLS = {
    "x86_64": {
        "arch": 0xC000003E, "clone": 56, "clone3": 435, "prlimit64": 302,
        "denied": {
            "socket": 41, "socketpair": 53, "connect": 42, "bind": 49, "listen": 50,
            "fork": 57, "vfork": 58, "execve": 59, "execveat": 322,
            "kill": 62, "tkill": 200, "tgkill": 234, "pidfd_send_signal": 424, "pidfd_open": 434,
            "rt_sigqueueinfo": 129, "rt_tgsigqueueinfo": 297,
            "ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311, "pidfd_getfd": 438,
            "mount": 165, "umount2": 166, "pivot_root": 155, "chroot": 161, "unshare": 272,
            "setns": 308, "open_tree": 428, "move_mount": 429, "fsopen": 430,
            "bpf": 321, "perf_event_open": 298, "userfaultfd": 323, "io_uring_setup": 425,
            "keyctl": 250, "add_key": 248, "request_key": 249, "init_module": 175,
            "finit_module": 313, "kexec_load": 246, "reboot": 169, "swapon": 167,
            "open_by_handle_at": 304, "setpriority": 141, "sched_setscheduler": 144,
            "shmget": 29, "msgget": 68, "semget": 64, "mq_open": 240, "setsid": 112,
        },
    },
    "aarch64": {
        "arch": 0xC00000B7, "clone": 220, "clone3": 435, "prlimit64": 261,
        "denied": {
            "socket": 198, "socketpair": 199, "connect": 203, "bind": 200, "listen": 201,
            "execve": 221, "execveat": 281,
            "kill": 129, "tkill": 130, "tgkill": 131, "pidfd_send_signal": 424, "pidfd_open": 434,
            "rt_sigqueueinfo": 138, "rt_tgsigqueueinfo": 240,
            "ptrace": 117, "process_vm_readv": 270, "process_vm_writev": 271, "pidfd_getfd": 438,
            "mount": 40, "umount2": 39, "pivot_root": 41, "chroot": 51, "unshare": 97,
            "setns": 268, "open_tree": 428, "move_mount": 429, "fsopen": 430,
            "bpf": 280, "perf_event_open": 241, "userfaultfd": 282, "io_uring_setup": 425,
            "keyctl": 219, "add_key": 217, "request_key": 218, "init_module": 105,
            "finit_module": 273, "kexec_load": 104, "reboot": 142, "swapon": 224,
            "open_by_handle_at": 265, "setpriority": 140, "sched_setscheduler": 119,
            "shmget": 194, "msgget": 186, "semget": 190, "mq_open": 180, "setsid": 157,
        },
    },
}  # fmt: skip


def main() -> None:
    order = json.loads(sys.stdin.buffer.read())
    report = order["report"]

    def say(verdict: str, reason: str) -> None:
        line = f"{order['nonce']} {verdict} {' '.join(reason.split())[:1000] or '-'}\n"
        os.write(report, line.encode("utf-8", "backslashreplace"))

    try:
        _redirect()
        _limit(order)
        if order["isolation"] == "full":
            _isolate()
    except (OSError, KeyError, ValueError, AttributeError) as error:
        say("refused", f"{type(error).__name__}: {error}")
        return
    namespace = {"__name__": "__main__"}
    try:
        exec(compile(order["program"], "answer.py", "exec"), namespace)
        sys.stdout.flush()
    except BaseException as error:  # SystemExit too: the tests at the end did not run
        say("failed", f"{type(error).__name__}: {error}")
    else:
        say("passed", "")
    os._exit(0)  # the program's threads and exit handlers do not run on


def _redirect() -> None:
    """Empties standard input and sends printed output to a file, which the size limit bounds."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    printed = os.open(OUTPUT, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(nothing, 0)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    os.close(nothing)
    os.close(printed)


def _limit(order: dict) -> None:
    """Sets the limits on time, memory, file size and open files."""
    seconds = order["seconds"]
    signal.setitimer(signal.ITIMER_REAL, seconds)  # SIGALRM ends the process
    for kind, value in (
        (resource.RLIMIT_CPU, int(seconds) + 1),
        (resource.RLIMIT_AS, order["memory"]),
        (resource.RLIMIT_FSIZE, order["file_size"]),
        (resource.RLIMIT_NOFILE, order["open_files"]),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def _isolate() -> None:
    """Enters a network namespace and Landlock where the kernel allows, then the seccomp filter.

    Raises `OSError` where the filter cannot be set up.
    """
    calls = _CALLS[platform.machine()]
    libc = ctypes.CDLL(None, use_errno=True)
    _leave_network(libc)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "no_new_privs")
    _close_files(libc, readable=[*_libraries()], writable=["."])
    _filter_calls(libc, calls)


def _leave_network(libc: ctypes.CDLL) -> None:
    # Many containers do not allow it; the filter refuses sockets in any case.
    libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET)


def _libraries() -> Iterable[str]:
    """The paths that Python, its libraries and the system's need to be read."""
    yield from {sys.prefix, sys.base_prefix, *(path for path in sys.path if path)}
    yield from (
        "/usr/lib",
        "/usr/lib64",
        "/lib",
        "/lib64",
        "/usr/share/zoneinfo",
        "/etc/ld.so.cache",
    )
    yield from ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")


def _close_files(libc: ctypes.CDLL, *, readable: Sequence[str], writable: Sequence[str]) -> None:
    """Forbids, by Landlock, opening other files. Has no effect on kernels without Landlock."""
    version = libc.syscall(444, None, ctypes.c_size_t(0), 1)  # landlock_create_ruleset, its ABI
    if version < 1:
        return
    rights = (1 << 13) - 1 | (1 << 13 if version >= 2 else 0) | (1 << 14 if version >= 3 else 0)
    handled = struct.pack("=Q", rights)
    rules = libc.syscall(444, handled, ctypes.c_size_t(len(handled)), 0)
    if rules < 0:
        raise OSError(ctypes.get_errno(), "landlock_create_ruleset")
    read_file, read_folder, write_file = 1 << 2, 1 << 3, 1 << 1
    for paths, allowed in ((readable, read_file | read_folder), (writable, rights & ~1)):
        for path in paths:
            if not os.path.exists(path):  # noqa: PTH110 (no more imports than needed)
                continue
            handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
            here = allowed
            if not os.path.isdir(path):  # noqa: PTH112
                here &= read_file | write_file
            rule = struct.pack("=Qi", here, handle)
            if libc.syscall(445, rules, _RULE_PATH, rule, 0):  # landlock_add_rule
                raise OSError(ctypes.get_errno(), f"landlock_add_rule {path}")
            os.close(handle)
    if libc.syscall(446, rules, 0):  # landlock_restrict_self
        raise OSError(ctypes.get_errno(), "landlock_restrict_self")
    os.close(rules)


def _filter_calls(libc: ctypes.CDLL, calls: dict) -> None:
    """Installs the seccomp filter, which allows new threads but no new process.

    Raises `OSError` where the kernel refuses it.
    """
    fail, unknown = _FAIL | _EPERM, _FAIL | _ENOSYS

    def when(number: int, result: int) -> list[tuple[int, int, int, int]]:
        return [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, result)]

    program = [
        (_LOAD, 0, 0, _ARCH),
        (_EQUAL, 1, 0, calls["arch"]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_SET, 0, 1, _X32),
        (_RETURN, 0, 0, unknown),
        # The flags of clone3 lie in memory, which a filter cannot read; libc falls back to clone.
        *when(calls["clone3"], unknown),
        *(line for number in calls["denied"].values() for line in when(number, fail)),
        # The program may read and lower its own limits, but not those of other processes.
        (_EQUAL, 0, 4, calls["prlimit64"]),
        (_LOAD, 0, 0, _FIRST),
        (_EQUAL, 1, 0, 0),
        (_RETURN, 0, 0, fail),
        (_RETURN, 0, 0, _ALLOW),
        (_EQUAL, 0, 3, calls["clone"]),
        (_LOAD, 0, 0, _FIRST),
        (_SET, 1, 0, _CLONE_THREAD),
        (_RETURN, 0, 0, fail),
        (_RETURN, 0, 0, _ALLOW),
    ]
    code = b"".join(struct.pack("=HBBI", *line) for line in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    header = struct.pack("@HP", len(program), ctypes.addressof(buffer))
    if libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, header, 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp")


if __name__ == "__main__":
    main()

"""Kernel calls of the jail: mounts, the read-only root, and the filter of system calls."""

import ctypes
import errno
import fcntl
import os
import socket
import struct

LIBC = ctypes.CDLL(None, use_errno=True)
MACHINE = os.uname().machine
SCRATCH = "/tmp"
MOUNT = dict(read_only=1, nosuid=2, nodev=4, noexec=8, bind=4096 | 16384, private=16384 | 1 << 18)
NEW_PID, NEW_MOUNT, NEW_NAMESPACES = 0x20000000, 0x20000, 0x7E020000

# System calls that no benchmark's program needs, and that reach past the sandbox, its bounds, or much of the kernel:
# x86-64 number, arm64 number (-1: it has none).
DENIED = {
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "pidfd_getfd": (438, 438), "process_madvise": (440, 440),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "move_mount": (429, 429),
    "open_tree": (428, 428), "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432),
    "fspick": (433, 433), "mount_setattr": (442, 442), "unshare": (272, 97), "setns": (308, 268),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "quotactl": (179, 60), "acct": (163, 89),
    # memory that no process is charged for
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "shmat": (30, 196),
    "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    # where the kernel's own faults were
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "fanotify_init": (300, 262),
    "modify_ldt": (154, -1), "personality": (135, 92), "vhangup": (153, 58), "syslog": (103, 116),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104),
    "kexec_file_load": (320, 294), "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "adjtimex": (159, 171), "clock_adjtime": (305, 266),
    "sethostname": (170, 161), "setdomainname": (171, 162), "iopl": (172, -1), "ioperm": (173, -1),
}  # fmt: skip
CLONE, CLONE3, SOCKET = (56, 220), (435, 435), (41, 198)
FAMILIES = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK)  # vsock knows no namespaces


def call(name: str, *arguments) -> None:
    """Call a function of the C library; raise OSError where it fails."""
    values = [value.encode() if isinstance(value, str) else value for value in arguments]
    values = [ctypes.c_long(value) if isinstance(value, int) else value for value in values]
    if getattr(LIBC, name)(*values) < 0:
        raise OSError(ctypes.get_errno(), f"{name}{arguments}: {os.strerror(ctypes.get_errno())}")


def mount(kind: str, path: str, *flags: str, data: str | None = None) -> None:
    call("mount", kind, path, kind, sum(MOUNT[flag] for flag in flags), data)


def build_root(binds: list[tuple[str, str]]) -> None:
    """In the namespaces of `unshare`, build a read-only root of what is to be seen and enter it."""
    root = "/sys"  # exists everywhere and holds nothing that is needed
    mount("tmpfs", root, "nosuid", "nodev", data="mode=755,size=1m")
    for folder in ("/proc", "/dev", SCRATCH):
        os.makedirs(root + folder)
    os.symlink(SCRATCH, f"{root}/dev/shm")
    mount("proc", f"{root}/proc", "nosuid", "nodev", "noexec")
    for shown, path in binds:
        os.makedirs(os.path.dirname(root + shown), exist_ok=True)
        if os.path.isdir(path):
            os.makedirs(root + shown, exist_ok=True)
        else:
            os.close(os.open(root + shown, os.O_CREAT))
        call("mount", path, root + shown, None, MOUNT["bind"], None)
    attributes = (ctypes.c_uint64 * 4)(MOUNT["read_only"] | MOUNT["nosuid"])
    call("syscall", 442, -100, root, 0x8000, attributes, 32)  # mount_setattr, and all that is mounted below
    os.chdir(root)
    call("syscall", DENIED["pivot_root"][MACHINE != "x86_64"], ".", ".")
    call("umount2", ".", 2)  # detach the old root
    os.chdir("/")
    link = socket.socket()  # to bring up the loopback device, as bwrap does
    fcntl.ioctl(link.fileno(), 0x8914, b"lo".ljust(16, b"\0") + b"\x41".ljust(24, b"\0"))
    link.close()


def filter_calls() -> None:
    """Have the kernel refuse this process and its children the calls that nothing here needs (seccomp, in BPF)."""
    column = ("x86_64", "aarch64").index(MACHINE)
    load, equal, at_least, has_bit, leave, allow = 0x20, 0x15, 0x35, 0x45, 0x06, 0x7FFF0000

    def refuse(reason):
        return leave, 0, 0, 0x50000 | reason

    architecture = (0xC000003E, 0xC00000B7)[column]
    lines = [(load, 0, 0, 4), (equal, 1, 0, architecture), refuse(errno.EPERM), (load, 0, 0, 0)]
    lines += [(at_least, 0, 1, 0x40000000), refuse(errno.EPERM)]  # the x32 calls of x86-64
    for numbers in DENIED.values():
        if numbers[column] >= 0:
            lines += [(equal, 0, 1, numbers[column]), refuse(errno.EPERM)]
    lines += [(equal, 0, 1, CLONE3[column]), refuse(errno.ENOSYS)]  # the C library then takes clone, to be looked into
    lines += [(equal, 0, 4, CLONE[column]), (load, 0, 0, 16), (has_bit, 0, 1, NEW_NAMESPACES), refuse(errno.EPERM)]
    lines += [(leave, 0, 0, allow), (equal, 1, 0, SOCKET[column]), (leave, 0, 0, allow), (load, 0, 0, 16)]
    for family in FAMILIES:
        lines += [(equal, 0, 1, family), (leave, 0, 0, allow)]
    program = b"".join(struct.pack("HBBI", *line) for line in [*lines, refuse(errno.EAFNOSUPPORT)])
    buffer = ctypes.create_string_buffer(program)
    call("prctl", 22, 2, struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(buffer)))

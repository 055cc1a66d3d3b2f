"""Attacks on files, other processes, the network and the kernel."""

from __future__ import annotations

from attack import FAST, Attack

from opdkit.tasks.sandbox import End


def _killed_by_filter(ends: tuple[End, ...]) -> str | None:
    (end,) = ends
    return None if end.code == -31 and end.reason == "exit" else f"{end.reason} {end.code}"  # SIGSYS


REACH = [
    Attack(
        name="read: files by every door",
        source="""
import io, linecache, pathlib, glob, mmap, tokenize, fileinput, sqlite3, importlib.util
path = "@SECRET_FILE@"
attempt("open", lambda: open(path).read())
attempt("io.open", lambda: io.FileIO(path).read())
attempt("os.open", os.open, path, os.O_RDONLY)
attempt("O_PATH", os.open, path, os.O_PATH)
attempt("pathlib", pathlib.Path(path).read_text)
attempt("SYS_open", system_call, 2, path.encode(), 0, 0)
attempt("SYS_openat", system_call, 257, -100, path.encode(), 0, 0)
attempt("SYS_openat2", system_call, 437, -100, path.encode(), struct.pack("QQQ", 0, 0, 0), 24)
attempt("SYS_creat", system_call, 85, path.encode(), 0)
attempt("open_tree", system_call, 428, -100, path.encode(), 0)
attempt("name_to_handle_at", system_call, 303, -100, path.encode(), bytes(128), bytes(8), 0)
attempt("sqlite", lambda: sqlite3.connect("file:" + path + "?mode=ro", uri=True).execute("select 1 from x"))
attempt("linecache", lambda: linecache.getlines(path)[0])
attempt("fopen", lambda: libc.fopen(path.encode(), b"r") or 1 / 0)
attempt("listdir", os.listdir, os.path.dirname(path))
attempt("glob", lambda: glob.glob(os.path.dirname(path) + "/*")[0])
attempt("chdir", os.chdir, os.path.dirname(path))
attempt("readlink", os.readlink, "/proc/self/exe")
attempt("stat", os.stat, path)
attempt("access", lambda: os.access(path, os.R_OK) or 1 / 0)
attempt("statvfs", os.statvfs, "/")
for place in ("/etc/passwd", "/etc/hostname", sys.executable, os.__file__, "/dev/null", "/dev/mem", "/dev/vda"):
    attempt(place, open, place, "rb")""",
    ),
    Attack(
        name="read: /proc",
        source="""
for pid in ("@TRAINER@", "@VICTIM@", "self", "1", str(os.getpid()), str(os.getppid())):
    for name in ("environ", "cmdline", "maps", "mem", "status", "fd", "cwd/..", "root", "exe"):
        attempt(f"{pid}/{name}", os.open, f"/proc/{pid}/{name}", os.O_RDONLY)""",
    ),
    Attack(
        name="read: descriptors left open",
        source="""
found = []
for number in range(3, 1024):
    for look in (os.fstat, lambda n: os.read(n, 1), lambda n: os.lseek(n, 0, 0), lambda n: os.dup(n),
                 lambda n: os.open(".", os.O_RDONLY, dir_fd=n)):
        try:
            look(number)
            found.append(number)
        except OSError:
            pass
if found: harm(found)""",
    ),
    Attack(
        name="read: the environment",
        source="""
if os.environ: harm(dict(os.environ))
environ = ctypes.POINTER(ctypes.c_char_p).in_dll(libc, "environ")
index = 0
while environ and environ[index]:
    print(environ[index])
    index += 1
libc.getenv.restype = ctypes.c_char_p
if libc.getenv(b"OPDKIT_SECRET"): harm("getenv")""",
    ),
    Attack(
        name="write: the secret file and its folder",
        source="""
path, folder = "@SECRET_FILE@", "@WRITABLE@"
attempt("open w", open, path, "w")
attempt("append", open, path, "a")
attempt("truncate", os.truncate, path, 0)
attempt("unlink", os.unlink, path)
attempt("rename", os.rename, path, path + "2")
attempt("link", os.link, path, folder + "/link")
attempt("chmod", os.chmod, path, 0o777)
attempt("chown", os.chown, path, 0, 0)
attempt("utime", os.utime, path)
attempt("setxattr", os.setxattr, path, "user.x", b"1")
attempt("rmdir", os.rmdir, folder)
attempt("SYS_fchmodat", system_call, 268, -100, path.encode(), 0o777)
attempt("SYS_renameat2", system_call, 316, -100, path.encode(), -100, path.encode() + b"2", 0)
import tempfile
attempt("tempfile", tempfile.TemporaryFile)
attempt("sync", system_call, 162)""",
    ),
    Attack(
        name="signal: others",
        source="""
for pid in {@TRAINER@, @VICTIM@, os.getppid(), 1, 2, 3, -@VICTIM@, 0, -1} - {os.getpid()}:
    attempt(f"kill {pid}", os.kill, pid, 0)
    attempt(f"kill {pid} SIGCONT", os.kill, pid, signal.SIGCONT)
    attempt(f"tgkill {pid}", system_call, 234, pid, pid, 0)
    attempt(f"tkill {pid}", system_call, 200, pid, signal.SIGCONT)
    attempt(f"sigqueue {pid}", system_call, 129, pid, signal.SIGCONT, struct.pack("iii", 18, 0, -1) + bytes(116))
    attempt(f"pidfd_open {pid}", system_call, 434, pid, 0)
attempt("killpg", os.killpg, 0, 0)
attempt("own pid in the upper half", system_call, 62, (1 << 32) | 1, 0)""",
    ),
    Attack(
        name="signal: through descriptors",
        source="""
import fcntl
read, write = os.pipe()
attempt("F_SETOWN", fcntl.fcntl, read, fcntl.F_SETOWN, @VICTIM@)
attempt("F_SETOWN_EX", fcntl.fcntl, read, 15, struct.pack("ii", 1, @VICTIM@))
attempt("F_SETSIG", fcntl.fcntl, read, 10, signal.SIGTERM)
attempt("F_NOTIFY", fcntl.fcntl, read, 1026, 1)
attempt("F_SETLEASE", fcntl.fcntl, 1, 1024, fcntl.F_WRLCK)
attempt("lock", fcntl.flock, 1, fcntl.LOCK_EX)
attempt("FIOSETOWN", fcntl.ioctl, read, 0x8901, struct.pack("i", @VICTIM@))
attempt("TIOCSTI", fcntl.ioctl, 0, 0x5412, b"x")
signal_victim = struct.pack("qiii", 0, 15, 4, @VICTIM@) + bytes(40)
attempt("timer that signals another", system_call, 222, 0, signal_victim, bytes(8))
attempt("mq_notify", system_call, 244, -1, 0)""",
    ),
    Attack(
        name="signal: priorities and limits of others",
        source="""
import resource
for pid in (@TRAINER@, @VICTIM@, os.getppid()):
    attempt("renice", os.setpriority, os.PRIO_PROCESS, pid, 19)
    attempt("affinity", os.sched_setaffinity, pid, {0})
    attempt("scheduler", os.sched_setscheduler, pid, os.SCHED_BATCH, os.sched_param(0))
    attempt("prlimit", resource.prlimit, pid, resource.RLIMIT_CORE, (0, 0))
    attempt("read prlimit", resource.prlimit, pid, resource.RLIMIT_CORE)
    attempt("ioprio", system_call, 251, 1, pid, 0)
    attempt("setpgid", os.setpgid, pid, 0)
    attempt("migrate_pages", system_call, 256, pid, 0, 0, 0)""",
    ),
    Attack(
        name="trace: memory and descriptors of others",
        source="""
buffer = ctypes.create_string_buffer(8)
vector = struct.pack("QQ", ctypes.addressof(buffer), 8)
for pid in (@TRAINER@, @VICTIM@, os.getppid(), 1):
    attempt("PTRACE_ATTACH", system_call, 101, 16, pid, 0, 0)
    attempt("PTRACE_SEIZE", system_call, 101, 0x4206, pid, 0, 0)
    attempt("process_vm_readv", system_call, 310, pid, vector, 1, vector, 1, 0)
    attempt("process_vm_writev", system_call, 311, pid, vector, 1, vector, 1, 0)
    attempt("kcmp", system_call, 312, pid, os.getpid(), 0, 0, 0)
    attempt("process_madvise", system_call, 440, pid, vector, 1, 21, 0)
attempt("PTRACE_TRACEME", system_call, 101, 0, 0, 0, 0)
attempt("pidfd_getfd", system_call, 438, 3, 3, 0)""",
    ),
    Attack(
        name="net: TCP",
        source="""
attempt("v4", lambda: socket.create_connection(("127.0.0.1", @TCP_PORT@), 1))
attempt("v6", lambda: socket.create_connection(("::1", @TCP6_PORT@), 1))
attempt("listen", lambda: socket.create_server(("0.0.0.0", 0)))
import urllib.request, http.client, asyncio
attempt("urllib", lambda: urllib.request.urlopen("http://127.0.0.1:@TCP_PORT@", timeout=1))
attempt("asyncio", lambda: asyncio.run(asyncio.open_connection("127.0.0.1", @TCP_PORT@)))
attempt("fast open", system_call, 41, 2, 1, 0)""",
    ),
    Attack(
        name="net: UDP, names and odd families",
        source="""
attempt("udp", lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", @UDP_PORT@)))
attempt("dns", socket.gethostbyname, "example.com")
attempt("getaddrinfo", socket.getaddrinfo, "localhost.example.com", 80)
for family in range(0, 46):
    for kind in (1, 2, 3, 5):
        attempt(f"socket {family} {kind}", system_call, 41, family, kind, 0)
        if family != 1:
            attempt(f"socketpair {family} {kind}", system_call, 53, family, kind, 0, ctypes.create_string_buffer(8))""",
    ),
    Attack(
        name="net: unix sockets",
        source="""
for address in ("@UNIX_PATH@", "\\0@ABSTRACT@"):
    attempt("connect", lambda: socket.socket(socket.AF_UNIX).connect(address))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    attempt("sendto", ours.sendto, b"x", address)
    attempt("connect of a pair", ours.connect, address)
    attempt("bind of a pair", ours.bind, "\\0opdkit-attack")
    attempt("descriptors", socket.send_fds, ours, [b"x"], [1])
    attempt("sendmsg", ours.sendmsg, [b"x"], [], 0, address)
    attempt("sendmmsg", system_call, 307, ours.fileno(), bytes(64), 1, 0)
    attempt("SO_PEERCRED forged", ours.setsockopt, socket.SOL_SOCKET, socket.SO_PASSCRED, 1)""",
    ),
    Attack(
        name="left: shared memory, queues and keys",
        source="""
attempt("shmget", system_call, 29, 0x0ddba11, 4096, 0o1666)
attempt("msgget", system_call, 68, 0x0ddba11, 0o1666)
attempt("semget", system_call, 64, 0x0ddba11, 1, 0o1666)
attempt("mq_open", system_call, 240, b"opdkit", os.O_CREAT | os.O_RDWR, 0o600, 0)
attempt("add_key", system_call, 248, b"user", b"opdkit", b"x", 1, -3)
attempt("keyctl", system_call, 250, 0, -3, 1)
attempt("request_key", system_call, 249, b"user", b"opdkit", 0, -3)""",
    ),
    Attack(
        name="left: a daemon",
        source="""
attempt("setsid", os.setsid)
if libc.daemon(0, 0) == 0: harm("daemon")
attempt("subreaper", system_call, 157, 36, 1, 0, 0, 0)
attempt("no parent death signal", system_call, 157, 1, 0, 0, 0, 0)""",
    ),
    Attack(
        name="kernel: namespaces, mounts and roots",
        source="""
for flag in (0x10000000, 0x00020000, 0x20000000, 0x40000000, 0x08000000, 0x04000000, 0x02000000, 0x80):
    attempt(f"unshare {flag:#x}", system_call, 272, flag)
    attempt(f"clone {flag:#x}", system_call, 56, flag | 0x10f00, 0, 0, 0, 0)
attempt("setns", system_call, 308, 0, 0)
attempt("mount", system_call, 165, b"none", b"/", b"tmpfs", 0, 0)
attempt("umount", system_call, 166, b"/", 2)
attempt("pivot_root", system_call, 155, b"/", b"/")
attempt("chroot", os.chroot, "/")
attempt("fsopen", system_call, 430, b"tmpfs", 0)
attempt("move_mount", system_call, 429, -1, b"/", -1, b"/", 0)""",
    ),
    Attack(
        name="kernel: calls that have had holes",
        source="""
never_reaches_the_kernel({
    "bpf": 321, "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "userfaultfd": 323,
    "perf_event_open": 298, "keyctl": 250, "add_key": 248, "modify_ldt": 154, "kexec_load": 246, "reboot": 169,
    "swapon": 167, "init_module": 175, "finit_module": 313, "delete_module": 176, "iopl": 172, "ioperm": 173,
    "syslog": 103, "settimeofday": 164, "clock_settime": 227, "adjtimex": 159, "sethostname": 170, "acct": 163,
    "quotactl": 179, "personality": 135, "ptrace": 101, "vmsplice": 278, "splice": 275, "tee": 276, "sendfile": 40,
    "copy_file_range": 326, "mbind": 237, "set_mempolicy": 238, "move_pages": 279, "mlock": 149, "mlockall": 151,
    "pkey_mprotect": 329, "remap_file_pages": 216, "fanotify_init": 300, "inotify_init1": 294, "timerfd_create": 283,
    "signalfd4": 289, "timer_create": 222, "landlock_create_ruleset": 444, "seccomp": 317, "memfd_create": 319,
    "execve": 59, "execveat": 322, "fork": 57, "vfork": 58, "socket": 41, "connect": 42, "accept4": 288, "bind": 49,
    "sendmsg": 46, "recvmsg": 47, "setsockopt": 54, "open_by_handle_at": 304, "lookup_dcookie": 212,
    "sched_setattr": 314, "sched_setscheduler": 144, "capset": 126, "setuid": 105, "futex_waitv": 449,
    "cachestat": 451, "map_shadow_stack": 453, "statmount": 457, "mseal": 462, "a number of the future": 600,
})""",
    ),
    Attack(
        name="kernel: privileges",
        source="""
for number in (0, 1000):
    attempt("setuid", os.setuid, number)
    attempt("setresuid", os.setresuid, number, number, number)
    attempt("setgid", os.setgid, number)
attempt("setgroups", os.setgroups, [0])
attempt("capset", system_call, 126, struct.pack("II", 0x20080522, 0), struct.pack("6I", *[0xFFFFFFFF] * 6))
for option, value in ((4, 1), (0x59616d61, -1), (8, 1), (28, 0), (47, 2), (38, 0), (22, 2), (59, 1)):
    attempt(f"prctl {option}", system_call, 157, option, value, 0, 0, 0)
attempt("another filter", system_call, 317, 1, 0, bytes(16))
attempt("nice", os.nice, -5)
attempt("real time", os.sched_setscheduler, 0, os.SCHED_FIFO, os.sched_param(1))
attempt("hostname", socket.sethostname, "attack")""",
    ),
    Attack(
        name="kernel: 32-bit calls",
        source="""
code = mmap.mmap(-1, 4096, prot=7)
code.write(bytes.fromhex("b814000000 cd80 c3"))  # mov eax, 20 (getpid of the 32-bit table); int 0x80; ret
function = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))
harm(f"int 0x80 -> {function()}")""",
        limits=FAST,
        complaint=_killed_by_filter,
    ),
    Attack(
        name="kernel: x32 calls",
        source="""
never_reaches_the_kernel({f"x32 {n}": 0x40000000 + n for n in (*range(0, 335), *range(512, 548))})""",
    ),
]

"""Stage one inside a sandbox: build the file system, start stage two without any privilege, and stay as its init.

Runs as the first process of fresh namespaces, with the right to mount in them and nothing from the network. Given as
source on the command line, so it imports nothing of this package. What the host shows is what `expose` lists, all
read-only; there is no /proc, no home and no /etc. The last namespace entered is a user namespace without any mapping:
the limit on processes then counts this sandbox alone, and no user id in it means anything outside.

Init stays outside of that user namespace, where what runs inside can neither trace nor kill it. It dies with the
process that started the namespaces, and the kernel ends with it all that runs in them, whatever session it fled to.
"""

import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Any

# linux/mount.h, linux/prctl.h, linux/sched.h
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC = 1, 2, 4, 32, 4096, 16384
MNT_DETACH = 2
AT_RECURSIVE, AT_FDCWD, SYS_MOUNT_SETATTR = 0x8000, -100, 442
CLONE_NEWUSER = 0x10000000
PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 24, 38

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: object) -> None:
    """One C call that answers 0, or OSError with its name."""
    if getattr(_libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}", str(arguments))


def _mount(source: str, target: str, kind: str | None, flags: int, data: str | None) -> None:
    texts = [text if text is None else text.encode() for text in (source, target, kind, data)]
    _call("mount", *texts[:3], ctypes.c_ulong(flags), texts[3])


def _expose(path: str, root: str) -> None:
    """Show a file, a folder or a symbolic link of the host, read-only with all that is mounted below it."""
    target = Path(root + path)
    target.parent.mkdir(parents=True, exist_ok=True)
    if Path(path).is_symlink():
        target.symlink_to(Path(path).readlink())
        return
    if Path(path).is_dir():
        target.mkdir(exist_ok=True)
    else:
        target.touch()
    _mount(path, str(target), None, MS_BIND | MS_REC, None)
    is_device = Path(path).is_char_device()
    attributes = (ctypes.c_uint64 * 4)(MS_RDONLY | MS_NOSUID | (0 if is_device else MS_NODEV), 0, 0, 0)
    _call(
        "syscall", SYS_MOUNT_SETATTR, AT_FDCWD, str(target).encode(), ctypes.c_uint(AT_RECURSIVE),
        ctypes.byref(attributes), ctypes.c_size_t(ctypes.sizeof(attributes)),
    )  # fmt: skip


def main() -> None:
    """`sys.argv[1]` is JSON: root, expose, workdir_bytes, user, command; only the command where the rest is done."""
    plan = json.loads(sys.argv[1])
    if "root" in plan:
        _build_root(plan)
        stage_two = os.fork()
        if stage_two != 0:
            os.closerange(0, 3)  # the pipes end with stage two
            while os.wait()[0] != stage_two:
                pass
            return
    _drop_privileges(plan.get("user"))
    os.execve(plan["command"][0], plan["command"], {})


def _build_root(plan: Any) -> None:
    """A root of read-only binds and a writable /tmp; this process moves into it."""
    root = plan["root"]
    _mount("none", root, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=1m")
    for path in plan["expose"]:
        _expose(path, root)
    workdir = Path(root, "tmp")
    workdir.mkdir(exist_ok=True)
    options = f"mode=1777,size={plan['workdir_bytes']},nr_inodes=4096"
    _mount("none", str(workdir), "tmpfs", MS_NOSUID | MS_NODEV, options)
    os.chdir(root)
    _call("pivot_root", b".", b".")
    _call("umount2", b".", MNT_DETACH)
    _mount("none", "/", None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV, None)
    os.chdir("/tmp")


def _drop_privileges(user: int | None) -> None:
    """Become `user` if given, enter a user namespace without mapping, and keep no capability over the next exec."""
    capability = 0
    while _libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) == 0:
        capability += 1
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    _call("unshare", CLONE_NEWUSER)
    _call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


if __name__ == "__main__":
    main()

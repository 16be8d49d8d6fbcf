"""Children forked from a warm parent, and deaths at any system call that changes a file."""

import errno
import mmap
import os
import random
import re
import select
import signal
import struct
import subprocess
import threading
import traceback
import warnings
from contextlib import suppress

CALLS = ("open", "write", "fsync", "mkdir", "rename", "replace", "unlink", "rmdir", "truncate", "ftruncate", "link")
"""What saving and deleting are made of, as the system sees it."""

INSTANTS = ("before", "after", "half-way")
"""Of a call; half-way means a write of half of its bytes."""


def in_a_child(fn, *args, kill_after=None):
    """Run a function in a forked process.

    Returns:
        ``(code, text)``: 0, 1 or minus the signal, and what it returned or the traceback; with `kill_after` it is killed after so many seconds.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setpgid(0, 0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                text = str(fn(*args))
            code = 0
        except BaseException:  # noqa: BLE001  # a child reports whatever it died of
            text = traceback.format_exc()
        finally:
            os.write(write, text.encode()[-60_000:])
            os._exit(code)
    os.close(write)  # a worker that outlives the child may hold its copy, so nothing waits for the end of the pipe
    if kill_after is not None:
        ended = os.pidfd_open(child)
        if not select.select([ended], [], [], kill_after)[0]:
            os.kill(child, signal.SIGKILL)
        os.close(ended)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with suppress(ProcessLookupError):  # loader workers that were being started when their parent died
        os.killpg(child, signal.SIGKILL)
    os.set_blocking(read, False)
    try:
        return code, os.read(read, 1 << 16).decode()
    except BlockingIOError:
        return code, ""
    finally:
        os.close(read)


class Shared:
    """A number that a dead child leaves behind."""

    def __init__(self):
        self.map = mmap.mmap(-1, 8)

    def get(self):
        return struct.unpack("q", self.map[:8])[0]

    def set(self, value):
        self.map[:8] = struct.pack("q", value)


def label_of(name, path, root):
    """A call and its place, without the numbers that differ from one save to the next."""
    place = os.path.relpath(path, root)
    place = re.sub(r"\.(tmp|old|gone)-[0-9a-f]+", r".\1", place)
    return f"{name} {re.sub('step-[0-9]+', 'step', place)}"


def path_of(target, options):
    """The path that a call is about: by descriptor, relative to one, or as it is."""
    if isinstance(target, int):
        return os.readlink(f"/proc/self/fd/{target}")
    base = options.get("dir_fd")
    target = os.fspath(target)
    return os.path.join(os.readlink(f"/proc/self/fd/{base}"), target) if base is not None else os.path.abspath(target)


class Watch:
    """Count the calls of this process that change files below a folder, and do something at one of them.

    Args:
        root: The folder.
        at: Kind and number of the call, such as ``("fsync checkpoints/.step.tmp", 3)``; None only counts.
        lasting: Whether what happens there happens at every later call too.
        act: Maps the call, its arguments and options to its result; it may also raise, or never return.
        renamed: Told the number of every checkpoint that was moved into its place.
    """

    def __init__(self, root, at=None, act=None, renamed=None, lasting=False):
        self.root, self.at, self.act, self.renamed = os.path.realpath(root), at, act, renamed
        self.lasting, self.begun = lasting, False
        self.seen, self.counts, self.lock, self.calls = [], {}, threading.Lock(), {name: getattr(os, name) for name in CALLS}
        for name in CALLS:
            setattr(os, name, self.watched(name))

    def stop(self):
        for name, call in self.calls.items():
            setattr(os, name, call)

    def watched(self, name):
        call = self.calls[name]

        def watching(target, *args, **options):
            path = path_of(target, options)
            if (name == "open" and not args[0] & (os.O_CREAT | os.O_WRONLY | os.O_RDWR)) or not path.startswith(self.root + os.sep):
                return call(target, *args, **options)
            if name in ("rename", "replace"):
                path = os.path.abspath(args[0])
            label = label_of(name, path, self.root)
            with self.lock:
                self.seen.append(label)
                self.counts[label] = self.counts.get(label, 0) + 1
                here = self.at == (label, self.counts[label]) or (self.begun and self.lasting)
                self.begun |= here
            found = self.act(call, target, *args, **options) if here else call(target, *args, **options)
            done = re.fullmatch(r"step-([0-9]+)", os.path.basename(path))
            if done and self.renamed is not None and name in ("rename", "replace"):
                self.renamed.set(max(self.renamed.get(), int(done[1])))
            return found

        return watching


def dying(instant):
    """An act: this process is killed before, after or half-way through the call."""

    def die(call, target, *args, **options):
        if instant == "after":
            call(target, *args, **options)
        if instant == "half-way":
            call(target, bytes(args[0])[: len(args[0]) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    return die


def failing(code):
    """An act: the system refuses the call; a full disk still deletes and renames."""

    def fail(call, target, *args, **options):
        if code == errno.ENOSPC and call.__name__ not in ("open", "write", "fsync", "mkdir"):
            return call(target, *args, **options)
        raise OSError(code, os.strerror(code))

    return fail


def vanishing(folder):
    """An act: somebody deletes a folder, and the call goes on."""

    def vanish(call, target, *args, **options):
        subprocess.run(["rm", "-rf", str(folder)], check=False)  # a thread may be writing
        return call(target, *args, **options)

    return vanish


def every_instant(labels):
    """All kinds of calls with every instant that they have, one each."""
    kinds = list(dict.fromkeys(labels))
    return [(kind, instant) for kind in kinds for instant in INSTANTS if instant != "half-way" or kind.startswith("write ")]


def instants(labels, count, seed):
    """So many instants to die at: every kind of call first, then any; each as ``((kind, number), instant)``."""
    rng, per = random.Random(seed), {kind: labels.count(kind) for kind in labels}
    found = [((kind, rng.randint(1, per[kind])), instant) for kind, instant in every_instant(labels)]
    rng.shuffle(found)
    rest = [((kind, n), i) for kind, i in every_instant(labels) for n in range(1, per[kind] + 1)]
    rest = [one for one in rest if one not in found]
    rng.shuffle(rest)
    return (found + rest)[:count]

"""Processes side by side: which GPUs there are, who gets one, and that all end with the program that started them."""
import ctypes
import heapq
import multiprocessing
import os
import signal
import threading
from contextlib import contextmanager
from multiprocessing import connection

import torch


BUSY = 4  # the exit code of a process started here whose folder another one is using


def visible_gpus(device):
    """CUDA_VISIBLE_DEVICES for each visible GPU alone; [None] on a CPU, or where the user named one GPU."""
    if device.type != "cuda" or device.index is not None:
        return [None]
    count = torch.cuda.device_count()
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given else [str(i) for i in range(count)]
    return names[:count]


class Slots:
    """Slots for processes: `jobs` on each GPU, or on the CPU. The lowest priority that waits is next."""

    def __init__(self, gpus, jobs):
        self.free = gpus * jobs
        self.count = len(self.free)
        self.waiting = []
        self.changed = threading.Condition()

    @contextmanager
    def take(self, priority):
        """Waits for a free slot and yields its GPU: the one with most free slots."""
        with self.changed:
            heapq.heappush(self.waiting, priority)
            self.changed.wait_for(lambda: self.free and self.waiting[0] == priority)
            heapq.heappop(self.waiting)
            gpu = max(self.free, key=self.free.count)
            self.free.remove(gpu)
            self.changed.notify_all()
        try:
            yield gpu
        finally:
            with self.changed:
                self.free.append(gpu)
                self.changed.notify_all()


def environment(gpu, threads, cache):
    """The environment of a process that has this GPU, `threads` cores, and shares its compiled code in `cache`."""
    own = {"OMP_NUM_THREADS": str(threads), "TORCHINDUCTOR_COMPILE_THREADS": str(threads),
           "TORCHINDUCTOR_CACHE_DIR": str(cache), "LAT_BUSY_CODE": str(BUSY)}
    if gpu is not None:
        own["CUDA_VISIBLE_DEVICES"] = gpu
    return os.environ | own


try:
    prctl = ctypes.CDLL(None).prctl
except (AttributeError, OSError, TypeError):                                      # not Linux
    prctl = None


def end_with_parent():
    """For Popen's preexec_fn: the process gets a SIGTERM when its parent ends, even by kill -9. On Linux only."""
    if prctl:
        set_parent_death_signal = 1
        prctl(set_parent_death_signal, signal.SIGTERM)


def watch_parent():
    """In a process of multiprocessing: ends it when its parent has ended, even by kill -9."""
    parent = multiprocessing.parent_process()

    def watch():
        connection.wait([parent.sentinel])
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()

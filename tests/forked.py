"""subprocess.Popen of one of our programs, from a process that has imported torch already: it starts in 0.2 s, not 4."""
import multiprocessing
import os
import runpy
import sys
from multiprocessing import forkserver
from pathlib import Path

import pytest

DEVNULL = os.devnull
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["torch._dynamo", "matplotlib.pyplot", "train"])


def run_program(command, environment, folder, output):
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    handle = os.open(output, os.O_WRONLY | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(handle, standard)
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


class Popen:
    """Of [sys.executable, program, *flags], with its output appended to a file. No more than experiments/compare.py
    asks of it."""

    def __init__(self, command, env, stdout, stdin=None, stderr=None, preexec_fn=None):
        with pytest.MonkeyPatch.context() as patch:                               # of the server, when it starts
            patch.setenv("OMP_NUM_THREADS", "1")
            patch.setenv("PYTHONPATH", str(Path(__file__).resolve().parent.parent))
            forkserver.ensure_running()
        python, *command = map(str, command)
        self.process = context.Process(target=run_program, args=(command, dict(env), os.getcwd(), stdout.name))
        self.process.start()

    @property
    def returncode(self):
        return self.process.exitcode

    def poll(self):
        return self.process.exitcode

    def terminate(self):
        self.process.terminate()

    def wait(self):
        self.process.join()
        return self.process.exitcode

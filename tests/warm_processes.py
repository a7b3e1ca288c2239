"""Processes that begin where TensorFlow, Keras and JAX are imported already, for which a fresh one takes four seconds.

They are forked from one that has imported and nothing else.
"""

import multiprocessing
import os
import subprocess
import sys

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["tensorflow", "robust_keras.commands.configuration"])


class Popen:
    """`target(**kwargs)` in such a process; what it says is appended to the file `log`. Else as `subprocess.Popen`."""

    def __init__(self, target, *, log, env=None, **kwargs):
        env = dict(os.environ if env is None else env)
        self._process = _SERVER.Process(target=_run, args=(target, kwargs, str(log), env), daemon=True)
        self._process.start()

    @property
    def pid(self):
        return self._process.pid

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        return self.returncode

    def wait(self, timeout=None):
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout)
        return self.returncode

    def send_signal(self, number):
        os.kill(self.pid, number)

    def kill(self):
        self._process.kill()


def _run(target, kwargs, log, env):
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(output, stream.fileno())
    os.environ.clear()
    os.environ.update(env)
    if "jax" in sys.modules:  # What it reads as it is imported.
        sys.modules["jax"].config.update("jax_num_cpu_devices", int(env["JAX_NUM_CPU_DEVICES"]))
    target(**kwargs)

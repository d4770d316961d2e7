"""Programs as subprocesses, the processes that they start, and limits of this one."""

import importlib
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[3]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def program_command(name, arguments):
    """Return the command line of a program of drivers/; `arguments` is a string or a list of strings."""
    words = arguments.split() if isinstance(arguments, str) else map(str, arguments)
    return [sys.executable, "-u", str(ROOT / f"drivers/{name}.py"), *words]


def run_program(name, arguments, cwd=None, **options):
    """Run a program of drivers/ to its end and check that it succeeds."""
    done = subprocess.run(program_command(name, arguments), cwd=cwd, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    return done


def call_program(name, arguments, capsys):
    """Run a program of drivers/ in this process, which saves the seconds of its imports; return what it prints."""
    words = arguments.split() if isinstance(arguments, str) else [*map(str, arguments)]
    capsys.readouterr()
    importlib.import_module(f"drivers.{name}").main(words)
    return capsys.readouterr().out


def restore_interrupt():
    """Undo that a shell ignores SIGINT in its background jobs, which their children would inherit."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def wait_until(condition, seconds=30.0):
    """Wait for a condition, and fail after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"the condition is still false after {seconds:g} s"
        time.sleep(0.05)


def end_process_after(seconds):
    """End this process, which a test has forked, if the test waits for it in vain."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(seconds)


def list_descendants(pid):
    """Return the processes that a process has started, directly or indirectly."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def is_gone(process):
    """Return whether a process has ended, reaped or not."""
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def list_engine_processes():
    """Return the processes that vLLM runs below this one."""
    return [
        child
        for child in psutil.Process().children(recursive=True)
        if not is_gone(child)
        and not {"resource_tracker", "forkserver"} & set(re.findall(r"\w+", " ".join(child.cmdline())))
    ]


def list_engine_threads():
    """Return the threads that wait for an engine's answer."""
    return [thread for thread in threading.enumerate() if thread.name == "engine"]


def list_shared_memory(pids):
    """Return the files in shared memory that these processes have open."""
    lines = [line for pid in pids for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
    return {line.split()[-1] for line in lines if "/dev/shm/" in line and "(deleted)" not in line}


def find_free_port():
    """Return a port of this machine that no process listens on."""
    with closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def limit_file_size(size):
    """Have the kernel refuse to write more than `size` bytes into one file, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

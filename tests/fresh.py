"""Processes in which nothing but torch is imported: forked from one that imported it, which takes a second."""

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

_FORKS = """
import gc, json, os, sys, traceback
import torch
gc.freeze()
for line in sys.stdin:
    code, arguments, environment, current, folder = json.loads(line)
    child = os.fork()
    if child:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    for number, name in enumerate(("in", "out", "err")):
        where = os.devnull if name == "in" else folder + "/" + name
        os.dup2(os.open(where, os.O_RDONLY if name == "in" else os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(current)
    sys.argv[1:] = arguments
    status = 0
    try:
        exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        status = int(bool(end.code))
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    os._exit(status)  # at once: an end in order would write to every page that it shares
"""


def python(code: str, *arguments: object, **environment: str) -> "subprocess.CompletedProcess[str]":
    """What ``python -c CODE ARGUMENTS`` exits with and prints, where variables of the environment are set.

    Those that torch reads when it is imported, such as ``OMP_NUM_THREADS``, come too late.
    """
    server = _server()
    with tempfile.TemporaryDirectory() as folder:
        given = [str(argument) for argument in arguments]
        request = json.dumps([code, given, {**os.environ, **environment}, os.getcwd(), folder])
        server.stdin.write(request + "\n")
        server.stdin.flush()
        status = int(server.stdout.readline())
        out, err = ((Path(folder) / name).read_text() for name in ("out", "err"))
    return subprocess.CompletedProcess(["python", "-c", code], status, out, err)


@functools.cache
def _server() -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", _FORKS]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(server.communicate)
    return server

"""Jupyter kernels that do not import torch: a server that has imported everything forks one for each request

python warm.py serve SOCKET           serve requests until standard input ends
python warm.py kernel SOCKET ...      be a kernel with the arguments of ipykernel_launcher, in a fork of the server
"""
import json
import os
import pkgutil
import select
import socket
import sys
import threading

KERNEL = ["ipykernel.kernelapp", "matplotlib_inline.backend_inline"]
HEAVY = ["fastai.learner", "numba", "plotly.graph_objects", "sklearn.linear_model", "torchvision"]  # imported late


def modules() -> list[str]:
    "Return every module that a notebook may need"
    import lps
    return [*KERNEL, *HEAVY, *(found.name for found in pkgutil.walk_packages(lps.__path__, "lps."))]


def kernel(path: str, *argv: str):
    "Request a kernel from the server, and end when it ends"
    request = dict(argv=argv, cwd=os.getcwd(), env=dict(os.environ))
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(path)
        server.sendall(json.dumps(request).encode() + b"\n")
        server.recv(1)


def serve(path: str):
    "Import everything, then fork a kernel for each request"
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"  # as a kernel sets it before its imports
    del sys.path[0]  # the tests' own folder
    for name in modules(): __import__(name)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        print("ready", flush=True)
        while sys.stdin.fileno() not in wait_for(listener): fork_kernel(listener)


def wait_for(listener) -> list[int]:
    "Return which of a socket and standard input have something to read"
    readable, _, _ = select.select([listener, sys.stdin], [], [])
    return [file.fileno() for file in readable]


def fork_kernel(listener):
    "Serve one request; the fork never returns"
    connection, _ = listener.accept()
    while reap(): pass
    if os.fork():
        connection.close()
        return
    listener.close()
    try: be_kernel(connection)
    finally: os._exit(0)


def reap() -> bool:
    "Collect one ended kernel; return whether there was one"
    try: return os.waitpid(-1, os.WNOHANG)[0] > 0
    except ChildProcessError: return False


def be_kernel(connection):
    "Run a kernel as `python -m ipykernel_launcher` does, in the caller's folder and with its environment"
    from ipykernel.kernelapp import launch_new_instance
    request = json.loads(connection.makefile().readline())
    threading.Thread(target=end_with, args=[connection], daemon=True).start()
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), sys.stdin.fileno())
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    os.environ.pop("JPY_PARENT_PID", None)  # of a process that is not its parent
    sys.path[:0] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    sys.argv = ["ipykernel_launcher", *request["argv"]]
    launch_new_instance()


def end_with(connection):
    "End this kernel when the process that requested it has ended"
    connection.recv(1)
    os._exit(1)


if __name__ == "__main__": dict(serve=serve, kernel=kernel)[sys.argv[1]](*sys.argv[2:])

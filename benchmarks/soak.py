"""Hours of use in little: tuning, evaluation, reports and a served page with many visitors, all at once, over and over.
Memory, open files and temporary files must stay as they are after the warm-up, and no request may fail.

Command:  python benchmarks/soak.py --minutes 45 --clients 8 --out benchmarks/results/soak.json
Hardware: any; it uses what it gets. Prints a table last and exits with 1 if a promise was broken. The promises are in
          docs/reliability.md.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
BACKBONE, DATA = "mini", "fashion-mnist-mini"
METHODS = ("tecoa", "capt", "apd", "pmg-aft")
ATTACKS = ("pgd", "autoattack")
LIMIT, SHOTS = 12, 2  # images of an evaluation; a class, in tuning
SECONDS = 5.0  # between two looks
FLAT = 0.05  # what memory may differ by
Look = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=45, help="how long, warm-up included")
    parser.add_argument("--warm-up", type=float, default=10, help="minutes before memory is compared")
    parser.add_argument("--clients", type=int, default=8, help="visitors of the page at the same time")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "soak.json")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker)
        return
    if not 0 < args.warm_up < args.minutes:
        parser.error("--warm-up must be shorter than --minutes")
    with tempfile.TemporaryDirectory(prefix="advtune-soak-") as folder:
        found = soak(Path(folder), args.minutes * 60, args.warm_up * 60, args.clients)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))
    sys.exit(bool(found["broken"]))


# --- what is done over and over -------------------------------------------------------------------------------


def work(folder: Path) -> None:
    """Tune, evaluate, predict, report: one cycle after the other in one process, a line for each, until killed."""
    import advtune
    from advtune.predict import Classifier
    from advtune.report import render
    from advtune.report.html import page

    pictures = [picture(seed) for seed in range(4)]
    for cycle in range(10**9):
        method, attack = METHODS[cycle % len(METHODS)], ATTACKS[cycle // len(METHODS) % len(ATTACKS)]
        out = folder / method
        how: dict[str, Any] = {"shots": SHOTS, "epochs": 1, "seed": cycle, "overwrite": True, "show": False}
        tuned = advtune.tune(method, BACKBONE, DATA, out=out, **how)
        budget = advtune.PGD(eps=4 / 255, steps=5) if attack == "pgd" else advtune.AutoAttack(eps=16 / 255)
        row = advtune.evaluate(tuned, DATA, budget, limit=LIMIT, out=out, resume=True, show=False)
        Classifier(str(out)).predict(pictures)
        sizes = len(render([row], "markdown")), len(page([row], {row.run: out}))
        print(
            json.dumps({"cycle": cycle, "method": method, "attack": attack, "n": row.clean["n"], "page": sizes}),
            flush=True,
        )


def picture(seed: int) -> Any:
    from PIL import Image

    draw = random.Random(seed)
    side = draw.choice((28, 64, 200))
    return Image.frombytes("RGB", (side, side), draw.randbytes(3 * side * side))


def png(seed: int) -> bytes:
    stream = io.BytesIO()
    picture(seed).save(stream, "PNG")
    return stream.getvalue()


# --- visitors ---------------------------------------------------------------------------------------------------


@dataclass
class Visits:
    """What the visitors of the page saw."""

    stop: threading.Event = field(default_factory=threading.Event)
    seconds: list[float] = field(default_factory=list)  # of each answered request
    failed: list[str] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)  # bytes of each upload


def visit(address: str, visits: Visits, number: int) -> None:
    """Open the page, attack a picture, upload another, attack it, send what is no picture; as a browser does, again
    and again."""
    import httpx

    turn = 0
    while not visits.stop.is_set():
        turn += 1
        session = f"visitor{number}x{turn}"
        try:
            with httpx.Client(base_url=address, timeout=600) as client:
                client.get("/").raise_for_status()
                config = client.get("/config").raise_for_status().json()
                with client.stream("GET", f"/gradio_api/heartbeat/{session}"):
                    for kind in ("click", "upload", "wrong"):
                        begin = time.monotonic()
                        answer = ask(client, config, session, kind, 1000 * number + turn, visits.sent)
                        expected = "at-note" if kind == "wrong" else "at-verdict"
                        if expected not in answer:
                            raise ValueError(f"{kind}: {answer[:200]}")
                        visits.seconds.append(time.monotonic() - begin)
        except Exception as error:
            if not visits.stop.is_set():
                visits.failed.append(f"{type(error).__name__}: {error}"[:300])
                time.sleep(1)


def ask(client: Any, config: dict[str, Any], session: str, kind: str, seed: int, sent: list[int]) -> str:
    """One question to the page, through Gradio's queue; the HTML of the answer. `sent` gets an upload's bytes."""
    ids = {each["props"].get("elem_id"): each["id"] for each in config["components"]}
    values = {each["id"]: each["props"].get("value") for each in config["components"]}
    place, event = (ids["attack"], "click") if kind == "click" else (ids["upload"], "upload")
    call = next(d for d in config["dependencies"] if [place, event] in [list(t) for t in d["targets"]])
    data = [values[i] for i in call["inputs"]]
    if kind != "click":
        content = png(seed) if kind == "upload" else b"no picture " * seed
        sent.append(len(content))
        stored = client.post("/gradio_api/upload", files={"files": (f"{seed}.png", content, "image/png")})
        data[0] = {"path": stored.raise_for_status().json()[0], "meta": {"_type": "gradio.FileData"}}
    answer = run(client, call["id"], place, session, data)
    for after in (d for d in config["dependencies"] if d["trigger_after"] == call["id"] and d["backend_fn"]):
        answer = run(client, after["id"], place, session, [values[i] for i in after["inputs"]])
    return answer


def run(client: Any, function: int, place: int, session: str, data: list[Any]) -> str:
    """What one function of the page says last."""
    body = {"data": data, "fn_index": function, "session_hash": session, "trigger_id": place}
    client.post("/gradio_api/queue/join", json=body).raise_for_status()
    with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as lines:
        for line in lines.iter_lines():
            message = json.loads(line[6:]) if line.startswith("data: ") else {}
            if message.get("msg") == "process_completed":
                if not message["success"]:
                    raise ValueError(str(message["output"]))
                return str(message["output"]["data"][-1])
    raise ValueError("no answer")


# --- the watch ----------------------------------------------------------------------------------------------------


def soak(folder: Path, seconds: float, warm: float, clients: int) -> dict[str, Any]:
    """Everything at once for so many seconds; what was seen, and which promises were broken."""
    import advtune
    from advtune import runs

    served = folder / "served"
    advtune.tune("tecoa", BACKBONE, DATA, shots=SHOTS, epochs=1, out=served / "tecoa", show=False)
    temporary = folder / "tmp"
    temporary.mkdir()
    environment = os.environ | {
        "ADVTUNE_CACHE": str(folder / "cache"),
        "TMPDIR": str(temporary),
        "OMP_NUM_THREADS": "1",
    }
    command = "import sys; from advtune.cli import main; sys.exit(main())"
    page = [sys.executable, "-c", command, "serve", str(served), "--port", "0", "--no-browser"]
    worker = [sys.executable, __file__, "--worker", str(folder / "work")]
    visits = Visits()
    looks: dict[str, list[Look]] = {"page": [], "worker": []}
    said, done = folder / "page.txt", folder / "work.txt"
    with started(page, environment, said) as one, started(worker, environment, done) as two:
        address = first_word(said, one)
        threads = [threading.Thread(target=visit, args=(address, visits, i), daemon=True) for i in range(clients)]
        for thread in threads:
            thread.start()
        begin = time.monotonic()
        while (now := time.monotonic() - begin) < seconds and one.poll() is None and two.poll() is None:
            for name, process in (("page", one), ("worker", two)):
                looks[name].append(look(process.pid, now))
            looks["page"][-1]["temporary"] = size(temporary)
            time.sleep(SECONDS)
        ended = [name for name, process in (("page", one), ("worker", two)) if process.poll() is not None]
        visits.stop.set()
        for thread in threads:
            thread.join(60)
    lines = done.read_text().splitlines()
    cycles = sum(line.startswith("{") for line in lines)
    return judge(looks, visits, ended, warm) | {
        "seconds": round(now), "warm_up": round(warm), "clients": clients, "cycles": cycles,
        "advtune": advtune.__version__, "versions": runs.versions(), "cores": os.cpu_count(),
        "tail": lines[-3:] if ended else [], "looks": {name: thin(each) for name, each in looks.items()},
    }  # fmt: skip


@contextmanager
def started(command: Sequence[str], environment: dict[str, str], out: Path) -> Iterator[subprocess.Popen[bytes]]:
    with out.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=environment)
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def first_word(out: Path, process: subprocess.Popen[bytes]) -> str:
    """The address that the page says it is at."""
    for _ in range(1200):
        for line in out.read_text().splitlines():
            if line.startswith("http://"):
                return line.split()[0]
        if process.poll() is not None:
            break
        time.sleep(0.1)
    raise SystemExit(f"the page did not start: {out.read_text()[-500:]}")


def look(pid: int, now: float) -> Look:
    """Memory in MB and open files of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    kilobytes = int(status.split("VmRSS:")[1].split()[0])
    return {"at": round(now, 1), "memory": kilobytes / 1000, "files": len(os.listdir(f"/proc/{pid}/fd"))}


def size(folder: Path) -> int:
    """Bytes of the files under a folder; what goes meanwhile has none."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def judge(looks: dict[str, list[Look]], visits: Visits, ended: Sequence[str], warm: float) -> dict[str, Any]:
    """Medians of the first and the last fifth after the warm-up, and the promises that do not hold."""
    broken = [f"{name} ended by itself" for name in ended]
    seen: dict[str, Any] = {}
    for name, each in looks.items():
        after = [one for one in each if one["at"] >= warm]
        if len(after) < 10:
            broken.append(f"{name}: too few looks after the warm-up")
            continue
        fifth = len(after) // 5
        for what in ("memory", "files", *(["temporary"] if "temporary" in after[0] else [])):
            first, last = (statistics.median(one[what] for one in part) for part in (after[:fifth], after[-fifth:]))
            seen[f"{name} {what}"] = {"first": first, "last": last, "most": max(one[what] for one in after)}
            if what == "memory" and abs(last - first) > FLAT * first:
                broken.append(f"{name}: memory went from {first:.0f} to {last:.0f} MB")
            if what == "files" and last > first:
                broken.append(f"{name}: open files went from {first:.0f} to {last:.0f}")
            if what == "temporary" and last > 2 * first + 1e6:
                broken.append(f"{name}: temporary files went from {first / 1e6:.1f} to {last / 1e6:.1f} MB")
    if visits.failed or not visits.seconds:
        broken.append(f"{len(visits.failed)} requests failed: {visits.failed[:1]}")
    times = sorted(visits.seconds) or [0.0]
    spread = {q: round(times[int(q / 100 * (len(times) - 1))], 2) for q in (50, 95, 100)}
    return {
        "seen": seen, "broken": broken,
        "requests": {"answered": len(visits.seconds), "failed": len(visits.failed), "seconds": spread,
                     "sent": sum(visits.sent)},
    }  # fmt: skip


def thin(looks: Sequence[Look], keep: int = 90) -> list[Look]:
    return list(looks[:: max(1, len(looks) // keep)])


def table(found: dict[str, Any]) -> str:
    lines = ["| after the warm-up | first fifth | last fifth | most |", "| --- | ---: | ---: | ---: |"]
    for name, each in found["seen"].items():
        scale = 1e6 if name.endswith("temporary") else 1
        unit = {"memory": " MB", "temporary": " MB"}.get(name.split()[1], "")
        cells = [f"{each[key] / scale:.0f}{unit}" for key in ("first", "last", "most")]
        lines.append(" | ".join([f"| {name}", *cells]) + " |")
    asked = found["requests"]
    lines.append(
        f"\n{found['seconds']} s, {found['cycles']} cycles of tuning and evaluation; {asked['answered']} requests "
        f"answered, {asked['failed']} failed; seconds by percentile {asked['seconds']}."
    )
    return "\n".join([*lines, *(f"BROKEN: {each}" for each in found["broken"])])


if __name__ == "__main__":
    main()

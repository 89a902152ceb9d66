"""From roster to programmed, and one peer's change: what bench-peers measures in the library itself."""

import json
import subprocess

from measure import Row, median, ratio, shown, spread


def helper(program, *arguments):
    """bench-peers: its lines, each a dict of milliseconds."""
    done = subprocess.run([program, *map(str, arguments)], stdout=subprocess.PIPE, text=True, check=True, timeout=900)
    return [json.loads(line) for line in done.stdout.splitlines()]


def roster(programs, quick):
    """1,000 peers at once, against a bare loop of the same messages."""
    lines = helper(programs.helper, "program", 1000, 3 if quick else 9)
    of = lambda name: [line[name] for line in lines]  # noqa: E731
    objects = lines[0]["objects"]
    rows = [
        ratio(
            f"1,000 peers from roster to programmed ({objects:,} objects)",
            "ms",
            of("ours"),
            of("bare"),
            "the same messages prebuilt, sent in a bare loop",
            ("at most", 1.3),
        )
    ]
    for name, what in [
        ("keys", "of which deriving all keys"),
        ("admitted", "of which checking statements and tags"),
        ("confirmed", "then 1,000 first probes to data flowing"),
    ]:
        rows.append(Row(what, f"{shown(median(of(name)))} ms", "", median(of(name)), "ms", spread(of(name))))
    return rows


def change(programs, quick):
    """One peer's change in a small mesh and in large ones."""
    sizes = [10, 1000] if quick else [10, 1000, 5000]
    lines = helper(programs.helper, "change", 10 if quick else 40, *sizes)
    of = lambda size, name: [line[name] for line in lines if line["peers"] == size]  # noqa: E731
    events = {"rotate": "a new epoch", "leave": "a peer leaves", "join": "a peer joins", "packets": "500 packets to a pod"}
    rows = []
    for size in sizes[1:]:
        for name, what in events.items():
            rows.append(
                ratio(f"{what}, among {size:,} peers", "ms", of(size, name), of(10, name), "among 10", ("at most", 1.5))
            )
    return rows


def rest(programs, quick):
    """What probes cost among peers who are there, in half an hour of simulated time."""
    rows = []
    for peers in [1000] if quick else [1000, 5000]:
        (line,) = helper(programs.helper, "rest", peers, 300 if quick else 1800)
        seconds = line["seconds"]
        share = (line["decide"] + line["send"]) / seconds / 10
        a_second = f"{line['probes'] / seconds:.0f} probes and answers, {line['bytes'] / seconds / 1000:.0f} kB sent a second"
        rows.append(Row(f"{peers:,} settled peers: {a_second}", f"{share:.2f} % of a processor", "", share, "%", "", ("at most", 1)))
    return rows

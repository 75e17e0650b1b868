#!/usr/bin/env python3
"""All-reduce within one machine: finetune beside other libraries, alternating in one run.

  python3 benches/allreduce.py --finetune target/release/finetune --ranks 2 4 --rounds 3 \\
      --peer 'gloo=torchrun --nproc_per_node {n} gloo_ar.py' --peer 'openmpi=mpirun -np {n} --mca btl self,tcp ./mpi_ar' \\
      --scaling 2 4 8 16 --output result.json

A peer is a command, in which {n} becomes the number of ranks. It prints CSV lines: field 3 is the
number of ranks, 4 the bytes, 7 the median and 8 the least time of one all-reduce in microseconds.
Medians over the rounds are compared. A ratio is the fastest peer's time over ours. --scaling
measures what a rank of ours costs as ranks are added: CPU, bytes sent, memory, join.
"""
import argparse, collections, datetime, json, os, re, statistics, subprocess, sys

arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
arguments.add_argument("--finetune", required=True)
arguments.add_argument("--ranks", type=int, nargs="*", default=[2, 4])
arguments.add_argument("--rounds", type=int, default=3)
arguments.add_argument("--max-bytes", default="64M")
arguments.add_argument("--peer", action="append", default=[], metavar="NAME=COMMAND")
arguments.add_argument("--scaling", type=int, nargs="*", default=[])
arguments.add_argument("--output")
options = arguments.parse_args()


def ours(ranks, *more):
    command = [options.finetune, "-v", "cluster", "bench", "-n", str(ranks), "--json", *more]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)


times = collections.defaultdict(list)
for _ in range(options.rounds):
    for ranks in options.ranks:
        for line in ours(ranks, "--max-bytes", options.max_bytes).stdout.splitlines():
            row = json.loads(line)
            assert row["wrong"] == 0, row
            times[ranks, row["bytes"], "finetune"].append((row["latency_us_median"], row["topology"]))
        for peer in options.peer:
            name, command = peer.split("=", 1)
            result = subprocess.run(command.format(n=ranks), shell=True, capture_output=True, text=True, timeout=600)
            for line in result.stdout.replace("\r", "").splitlines():
                fields = line.split(",")
                if len(fields) > 8 and fields[2] == str(ranks):
                    times[ranks, int(fields[3]), name].append((float(fields[6]), ""))

rows = []
names = sorted({name for _, _, name in times} - {"finetune"})
print(f"{'ranks':>5} {'bytes':>10} {'algorithm':>9} {'finetune µs':>12} " + " ".join(f"{name:>12}" for name in names) + f" {'ratio':>7}")
for ranks, size in sorted({(ranks, size) for ranks, size, name in times if name == "finetune"}):
    median = lambda name: statistics.median(time for time, _ in times[ranks, size, name]) if times[ranks, size, name] else None
    mine, peers = median("finetune"), {name: median(name) for name in names}
    algorithm = times[ranks, size, "finetune"][-1][1]
    best = min((time for time in peers.values() if time), default=None)
    row = {"ranks": ranks, "bytes": size, "algorithm": algorithm, "finetune_us": mine, **{f"{name}_us": peers[name] for name in names}}
    row["ratio"] = best / mine if best else None
    rows.append(row)
    cells = " ".join(f"{peers[name]:12.1f}" if peers[name] else f"{'-':>12}" for name in names)
    print(f"{ranks:5} {size:10} {algorithm:>9} {mine:12.1f} {cells} " + (f"{row['ratio']:7.2f}" if best else "      -"))

scaling = []
for ranks in options.scaling:
    for topology in ["mesh", "ring"]:
        result = ours(ranks, "--min-bytes", "16M", "--max-bytes", "16M", "--topology", topology)
        row = json.loads(result.stdout.splitlines()[-1])
        joined = re.search(r"ranks joined over \w+ in (\d+) ms", result.stderr)
        cost = re.search(r"rank 0: (\d+) operations of (\d+) bytes, (\d+) bytes sent, ([\d.]+) CPU s, peak memory (\d+) KiB", result.stderr)
        reductions, size, sent, cpu, memory = (float(group) for group in cost.groups())
        floor = 2 * (ranks - 1) / ranks * size
        scaling.append({
            "ranks": ranks, "algorithm": topology, "bytes": int(size), "join_ms": int(joined.group(1)),
            "latency_us_median": row["latency_us_median"], "cpu_ms_per_reduction": cpu / reductions * 1e3,
            "bytes_sent_over_floor": sent / reductions / floor, "peak_memory_kib": int(memory),
        })
        print(json.dumps(scaling[-1]))

if options.output:
    machine = {line.split(":")[0].strip(): line.split(":")[1].strip() for line in open("/proc/cpuinfo") if "model name" in line}
    report = {
        "date": datetime.date.today().isoformat(), "command": " ".join(sys.argv), "processor": machine.get("model name"),
        "cores": os.cpu_count(), "rounds": options.rounds, "all_reduce": rows, "scaling": scaling,
    }
    with open(options.output, "w") as file:
        json.dump(report, file, indent=1)
        file.write("\n")

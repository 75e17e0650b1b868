#!/usr/bin/env python3
"""Ray: one rank per actor, spread over the cluster's nodes.

    ray job submit --working-dir . -- python ray_finetune.py recipe.toml /shared/runs/support-bot --ranks 2
    python ray_finetune.py recipe.toml runs/support-bot --ranks 2 --cpus 1      # on a Ray of its own, here

Ray only places the ranks; each is the ordinary program, told its place by RANK, WORLD_SIZE, MASTER_ADDR and
MASTER_PORT, as Ray Train tells torch. The recipe, its model, its data and the run directory lie on storage that all
nodes share. The token is made anew for each start; it travels inside Ray and lies in a file that only this user reads.
The exit code is the program's.
"""

import argparse
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

# 3 a rank was lost, 137 killed (or its node was), 143 stopped after saving, by Ray or by its node.
RETRYABLE = {3, 137, 143}
# 1 a bug, 2 bad input, 4 loss not finite, 5 disk or memory full: a person has to look first.
HOPELESS = {1, 2, 4, 5}


@ray.remote(max_concurrency=2)
class Rank:
    def __init__(self):
        self.process = None
        self.stopped = False

    def address(self):
        """An address of this node that the others reach, and a port that is free on it."""
        with socket.socket() as listener:
            listener.bind(("", 0))
            return ray.util.get_node_ip_address(), listener.getsockname()[1]

    def run(self, rank, world, master, token, arguments):
        descriptor, path = tempfile.mkstemp()  # readable by this user only
        os.write(descriptor, token.encode())
        os.close(descriptor)
        address, port = master
        environment = dict(
            os.environ,
            RANK=str(rank),
            WORLD_SIZE=str(world),
            MASTER_ADDR=address,
            MASTER_PORT=str(port),
            FINETUNE_TOKEN_FILE=path,
        )
        try:
            self.process = subprocess.Popen(["finetune", "run", *arguments], env=environment)
            code = self.process.wait()
        finally:
            os.unlink(path)
        return code if code >= 0 else 128 - code

    def stop(self):
        """Asks it to save and stop; `run` returns then."""
        if self.process is not None and not self.stopped:
            self.stopped = True
            self.process.send_signal(signal.SIGTERM)


def start(options, arguments, stop):
    """All ranks once; the exit code that says most."""
    bundle = {"CPU": options.cpus}
    if options.gpus:
        bundle["GPU"] = options.gpus
    group = placement_group([bundle] * options.ranks, strategy="SPREAD")
    ray.get(group.ready())
    place = [PlacementGroupSchedulingStrategy(group, bundle) for bundle in range(options.ranks)]
    ranks = [
        Rank.options(num_cpus=options.cpus, num_gpus=options.gpus, scheduling_strategy=there).remote()
        for there in place
    ]
    try:
        master = ray.get(ranks[0].address.remote())
        token = secrets.token_hex(32)
        waiting = [
            actor.run.remote(rank, options.ranks, master, token, arguments) for rank, actor in enumerate(ranks)
        ]
        codes, told = [], False
        while waiting:
            if stop.is_set() and not told:
                told = True
                for actor in ranks:
                    actor.stop.remote()
            done, waiting = ray.wait(waiting, timeout=0.5)
            for result in done:
                try:
                    codes.append(ray.get(result))
                except ray.exceptions.RayActorError:  # the node is gone; the other ranks notice by themselves
                    codes.append(137)
        print(f"exit codes of the ranks, as they ended: {codes}", file=sys.stderr)
        hopeless = [code for code in codes if code in HOPELESS]
        failed = [code for code in codes if code != 0]
        return (hopeless or failed or [0])[0]
    finally:
        for actor in ranks:
            ray.kill(actor)
        remove_placement_group(group)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe")
    parser.add_argument("run")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--cpus", type=float, default=8, help="processors per rank")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs per rank")
    parser.add_argument("--restarts", type=int, default=10)
    options = parser.parse_args()
    ray.init()
    # Ranks run in other folders, maybe on other machines.
    arguments = [os.path.abspath(options.recipe), "--output-dir", os.path.abspath(options.run), "--resume"]
    stop = threading.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: stop.set())
    for left in range(options.restarts, -1, -1):
        code = start(options, arguments, stop)
        if code not in RETRYABLE or stop.is_set() or left == 0:
            break
        print(f"exit code {code}: starting again ({left} restarts left)", file=sys.stderr)
        time.sleep(5)
    sys.exit(code)


if __name__ == "__main__":
    main()

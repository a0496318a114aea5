"""Run a script on a local Ray cluster: a head and two workers.

`python tests/ray_cluster.py SCRIPT ARGUMENTS`. It runs in its own process,
since Ray starts its nodes by `fork`, which is unsafe in a process with JAX's
threads.
"""

import os
import runpy
import sys

from ray.cluster_utils import Cluster

NODE = {"num_cpus": 1, "object_store_memory": 100 * 2**20}


def main():
    """Start the nodes, run the script, and stop them."""
    # Without a dashboard, whose processes take seconds to start.
    head = NODE | {"include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(2):
            cluster.add_node(**NODE)
        cluster.wait_for_nodes()
        os.environ["RAY_ADDRESS"] = cluster.address
        del sys.argv[0]
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()

"""What a study's workers ask of a cluster, and how many of them its nodes hold. The pool of cells and the doctor both go by this.

nodes = alive()
fitting(nodes, resources, reserved={})                 # places of the pool
room_for(nodes, [of_trainer(resources)])               # workers of a pretraining
"""

from collections.abc import Mapping, Sequence

from cluster.study import Resources

MOST = 8  # teams on one GPU: more of them share its time without using it better
EPSILON = 1e-9


def alive() -> list[dict[str, float]]:
    """Resources of the nodes that are there."""
    import ray

    return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def fitting(nodes: Sequence[Mapping[str, float]], resources: Resources, reserved: Mapping[str, float]) -> int:
    """Places that these nodes have room for, whoever holds it; while others hold everything back, none. At least one where nothing is held
    back: a cluster that grows on demand grows by who waits.

    Args:
        reserved: what running or waiting pretrainings hold back, {"CPU": ..., "GPU": ...}.
    """
    needs = of_place(resources, nodes)
    fits = room_for(nodes, needs)
    for name, need in together(needs).items():
        if reserved.get(name):
            fits = min(fits, int((sum(node.get(name, 0.0) for node in nodes) - reserved[name]) / need + EPSILON))
    if resources.cell_workers:
        fits = min(fits, resources.cell_workers) if any(reserved.values()) else resources.cell_workers
    return max(0 if any(reserved.values()) else 1, fits)


def of_place(resources: Resources, nodes: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """What a place asks Ray for: a bundle for each process of a team, or one for all teams of a GPU."""
    if resources.gpus_per_cell == "measured":
        return [{"CPU": float(resources.threads * teams_on_gpu(resources, nodes)), "GPU": 1.0}]
    bundle = {"CPU": float(resources.threads)}
    if resources.gpus_per_cell:
        bundle["GPU"] = resources.gpus_per_cell
    return [dict(bundle) for _ in range(resources.cell_ranks)]


def teams_on_gpu(resources: Resources, nodes: Sequence[Mapping[str, float]]) -> int:
    """How many teams a GPU's share of its node's processors can feed, on the node where they are fewest."""
    shares = [node.get("CPU", 0.0) / node["GPU"] / resources.threads for node in nodes if node.get("GPU")]
    return max(1, min(MOST, *(int(share + EPSILON) for share in shares))) if shares else 1


def room_for(nodes: Sequence[Mapping[str, float]], bundles: Sequence[Mapping[str, float]]) -> int:
    """How many times the nodes hold all of these bundles, which are equal: together on one node, a share of a GPU on one GPU."""
    return sum(_on_node(node, bundles[0], len(bundles)) for node in nodes)


def _on_node(node: Mapping[str, float], bundle: Mapping[str, float], count: int) -> int:
    fits = node.get("CPU", 0.0) / bundle["CPU"]
    if gpus := bundle.get("GPU"):
        whole = int(node.get("GPU", 0.0))
        fits = min(fits, whole * int(1 / gpus + EPSILON) if gpus <= 1 else whole / gpus)
    return int(fits / count + EPSILON)


def together(bundles: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """What bundles that are equal come to."""
    return {name: len(bundles) * size for name, size in bundles[0].items()}


def of_trainer(resources: Resources) -> dict[str, float]:
    """What a worker of a pretraining asks Ray for."""
    gpus = resources.gpus_per_pretrain_worker
    return {"CPU": float(resources.threads), **({"GPU": gpus} if gpus else {})}


def of_pretraining(resources: Resources) -> dict[str, float]:
    """What one pretraining holds of the cluster: an elastic one begins with its fewest workers."""
    return together([of_trainer(resources)] * resources.pretrain_range[0])

"""The headings that long lists of options have in the help; the rest is under Options."""

# By the name of the command: heading -> names of parameters.
HEADINGS = {
    "solve": {
        "Cluster": (
            *("gpus_per_node", "nodes", "ep_size", "tensor_parallel_size", "ep_groups"),
            *("inter_cost", "intra_cost", "topology"),
        ),
        "Engine and model": (
            *("engine", "exchange", "policy", "replica_choice", "hardware", "model"),
            *("hidden_size", "expert_size", "weight_bytes"),
        ),
        "Goal and limits": (
            *("objective", "max_imbalance", "max_home_imbalance", "max_received_copies"),
            *("relax_cap", "frontier", "robust", "overflow_price", "receive_price"),
        ),
        "Redundant experts": ("redundant_experts", "redundant_gain", "redundant_memory"),
        "Start and fixed experts": (
            *("start", "migration_cost", "pin", "preserve_groups", "ignore_groups"),
        ),
        "Which tokens": ("fold", "not_fold", "phase"),
        "Search": (
            *("time_limit", "seed", "proof", "require_optimal", "num_sweeps"),
            *("num_rounds", "params"),
        ),
    },
    "simulate": {
        "Engine and batches": (
            *("engine", "replica_choice", "table", "tokens_per_rank", "batching"),
            "baseline",
        ),
        "Predicted time": (
            *("hardware", "model", "hidden_size", "expert_size", "weight_bytes"),
        ),
        "Which tokens": ("fold", "not_fold", "phase"),
    },
}

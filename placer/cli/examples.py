"""Examples that the help of each command ends with. Each is a complete command."""

# By the name of the command.
EXAMPLES = {
    "record": (
        "placer record model --corpus texts --out trace",
        "placer record model --domain law=law --domain code=src --out trace",
        "torchrun --nproc-per-node 8 --no-python placer record model --corpus texts "
        "--device cuda --out trace",
    ),
    "import": (
        "placer import vllm-routed responses.jsonl --model model --out trace",
        "placer import sglang-stat dump.pt --model model --out loads.safetensors",
        "placer import sglang-map map.json --model model --gpus-per-node 8 --out plan.json",
    ),
    "affinity": (
        "placer affinity trace --fold 0/2 --out counts.safetensors",
        "placer affinity --merge one.safetensors two.safetensors --out all.safetensors",
    ),
    "advise": (
        "placer advise trace --gpus-per-node 8",
        "placer advise trace --nodes 2 --gpus-per-node 8 --engine vllm --hardware h100 "
        "--model model",
    ),
    "solve": (
        "placer solve trace --gpus-per-node 8 --fold 0/2 --out plan.json",
        "placer solve trace --nodes 2 --gpus-per-node 8 --engine sglang-deepep "
        "--redundant-experts 16 --out plan.json",
        "placer solve loads.safetensors --gpus-per-node 8 --objective balance "
        "--out plan.json",
    ),
    "prove": (
        "placer prove plan.json trace --fold 0/2 --out better.json",
        "placer prove plan.json trace --certificate proof.json",
        "placer prove plan.json trace --check proof.json",
    ),
    "tables": ("placer tables plan.json trace --out table.safetensors",),
    "export": (
        "placer export checkpoint plan.json model --out permuted",
        "placer export sglang plan.json model --out map.json",
        "placer export checkpoint permuted --inverse --out restored",
    ),
    "verify": (
        "placer verify model permuted plan.json",
        "placer verify model map.json plan.json",
    ),
    "simulate": (
        "placer simulate plan.json trace --not-fold 0/2",
        "placer simulate plan.json trace --engine sglang --hardware h100 --model model",
    ),
    "replay": (
        "placer replay plan.json model --trace trace",
        "torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d "
        "--rdzv-endpoint HOST:29500 --no-python placer replay plan.json model "
        "--trace trace --device cuda",
    ),
    "calibrate": (
        "placer calibrate --ranks 8 --device cuda --out cluster.toml",
        "torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d "
        "--rdzv-endpoint HOST:29500 --no-python placer calibrate --nodes 2 "
        "--device cuda --out cluster.toml",
    ),
    "check": ("placer check plan.json trace-of-today",),
    "inspect": (
        "placer inspect trace",
        "placer inspect plan.json trace --html report.html",
    ),
    "demo": ("placer demo --out placer-demo",),
    "validate": ("placer trace validate trace",),
    "split": (
        "placer trace split trace --phase decode --out decode",
        "placer trace split trace --period 1/2 --out later-half",
    ),
    "sample": ("placer trace sample trace --sequences 1000 --out small",),
    "merge": ("placer trace merge monday tuesday --out both",),
    "dedup": ("placer trace dedup trace --fold 0/2 --out clean",),
    "links": ("placer trace links trace",),
    "learning": ("placer trace learning trace --gpus-per-node 8",),
}

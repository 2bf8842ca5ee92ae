"""The formats of runtime maps, registered once by name; light, as help lists them."""

#: Module and attribute of the ``Runtime`` of each format, by its name.
MAPS = {
    "sglang": ("sglang", "SGLANG"),
    "trtllm": ("trtllm", "TRTLLM"),
    "vllm-ascend": ("vllm_ascend", "VLLM_ASCEND"),
    "vllm-pr49572": ("vllm", "PROPOSED"),
    "vllm-das": ("vllm", "DAS"),
    "eplb": ("eplb", "EPLB"),
    "csv": ("plain", "CSV"),
    "json": ("plain", "JSON"),
}

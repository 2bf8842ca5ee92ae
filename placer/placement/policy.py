"""Home policies and exchanges that a plan can be solved for."""

from typing import Literal

Policy = Literal["fixed", "follow"]
#: Policies whose homes a token-shuffle table gives.
ContentPolicy = Literal["token", "request"]
HomePolicy = Policy | ContentPolicy
Exchange = Literal["per-rank", "per-node"]

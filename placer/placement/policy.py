"""Home policies that a plan can be solved for."""

from typing import Literal, get_args

Policy = Literal["fixed", "follow"]
#: Policies whose homes a token-shuffle table gives.
ContentPolicy = Literal["token", "request"]
HomePolicy = Policy | ContentPolicy
POLICIES: tuple[HomePolicy, ...] = (*get_args(Policy), *get_args(ContentPolicy))

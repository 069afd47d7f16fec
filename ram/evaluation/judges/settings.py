"""The settings of the judges: the keys of config/judge/*.yaml."""

from dataclasses import dataclass
from typing import Literal

from ram.settings.checks import Count, CountOrZero, Dtype, NotNegative, Positive


@dataclass(frozen=True)
class JudgeSettings:
    """Settings of a judge without any of its own."""

    name: str


@dataclass(frozen=True)
class ServedSettings(JudgeSettings):
    """Settings of a judge that asks a server."""

    urls: list[str]
    model: str | None
    criterion: Literal["helpful", "harmless", "summary"] | None
    instruction_key: str
    key_env: str
    concurrency: Count
    retries: CountOrZero
    timeout: Positive
    max_requests: Count | None
    input_price: NotNegative | None
    output_price: NotNegative | None
    max_price: Positive | None


@dataclass(frozen=True)
class EndpointSettings(ServedSettings):
    both_orders: bool


@dataclass(frozen=True)
class RewardModelSettings(JudgeSettings):
    model: str | None
    hub_id: str | None
    instruction_key: str
    max_length: Count
    batch_size: Count
    dtype: Dtype


JUDGE_SETTINGS: dict[str, type[JudgeSettings]] = {
    "exact": JudgeSettings,
    "dummy": JudgeSettings,
    "endpoint": EndpointSettings,
    "alpaca_eval": ServedSettings,
    "reward_model": RewardModelSettings,
}

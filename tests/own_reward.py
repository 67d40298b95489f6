"""A reward of one's own, as docs/sampling.md shows it: `method=grpo reward=tests/own_reward.py`."""

from trainer.evaluate import is_right


def reward(question: str, gold: str, outputs: list[str]) -> list[float]:
    """Right by number, and short: a tenth less for each ten characters."""
    return [is_right(text, gold, "number") - len(text) / 100 for text in outputs]

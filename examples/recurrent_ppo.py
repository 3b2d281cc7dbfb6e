"""Train a recurrent policy by PPO: episodes end anywhere in a rollout, and an update is still one call of the layer.

The task: the first observation of an episode shows one of four signs; after 2 to 9 steps of noise the agent is asked
for it, and gets a reward of 1 for the right answer. Without memory one answer in four is right.

Rollouts run a stream, microseconds a step. Training runs all steps of all environments at once: ``resets`` puts a row
back to the initial state at each step that begins an episode. The first update checks that this equals a loop over
steps.

    python examples/recurrent_ppo.py --updates 60
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Categorical

import fusecell as fc

SIGNS, LONGEST = 4, 9
FEATURES = SIGNS + 2  # the sign (one-hot), whether it is asked for, noise


class Recall:
    """A batch of environments; each starts its next episode by itself.

    Attributes:
        sign: int (count,), what to remember.
        delay: int (count,), steps until the agent is asked.
        fresh: bool (count,), whether the next step is the first of an episode.
    """

    def __init__(self, count: int, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.sign = np.zeros(count, int)
        self.delay = np.zeros(count, int)
        self.begin(np.arange(count))

    def begin(self, rows: np.ndarray) -> None:
        """Start a new episode in some rows."""
        self.sign[rows] = self.random.integers(SIGNS, size=len(rows))
        self.delay[rows] = self.random.integers(2, LONGEST + 1, size=len(rows))
        self.fresh = np.zeros(len(self.sign), bool)
        self.fresh[rows] = True

    def observe(self) -> np.ndarray:
        """Return the observations, (count, FEATURES)."""
        observation = np.zeros((len(self.sign), FEATURES), np.float32)
        observation[self.fresh, self.sign[self.fresh]] = 1
        observation[:, SIGNS] = self.delay == 0
        observation[:, SIGNS + 1] = self.random.normal(size=len(self.sign))
        return observation

    def act(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Take an action in each environment; return the rewards, and which episodes have ended."""
        ended = self.delay == 0
        reward = (ended & (action == self.sign)).astype(np.float32)
        self.delay -= 1
        self.begin(np.flatnonzero(ended))
        return reward, ended


class Policy(nn.Module):
    """A GRU with a readout of the logits of the actions and of the value."""

    def __init__(self, hidden: int = 32) -> None:
        super().__init__()
        self.memory = fc.Recurrent(fc.GRUCell(FEATURES, hidden))
        self.head = nn.Linear(hidden, SIGNS + 1)

    def forward(self, observation: Tensor, resets: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Map (T, N, FEATURES) to logits (T, N, SIGNS) and values (T, N)."""
        y, _ = self.memory(observation, state, resets=resets)
        out: Tensor = self.head(y)
        return out[..., :SIGNS], out[..., SIGNS]


@dataclass
class Rollout:
    """What a policy saw and did, (T, N) or (T, N, FEATURES) each; ``state`` is the one before the first step."""

    observation: Tensor
    begins: Tensor
    action: Tensor
    log_prob: Tensor
    value: Tensor
    reward: Tensor
    ended: Tensor
    state: Tensor


def collect(policy: Policy, stream: fc.Stream, env: Recall, steps: int) -> Rollout:
    """Run the policy for some steps; the stream and the environments continue from where they are."""
    stream.refresh()  # reads the weights of the last update; the state stays
    columns: dict[str, list[np.ndarray]] = {name: [] for name in Rollout.__annotations__ if name != "state"}
    first = torch.from_numpy(stream.state[0])
    for _ in range(steps):
        begins = env.fresh.copy()
        stream.reset(begins)
        observation = env.observe()
        with torch.no_grad():
            out = policy.head(torch.from_numpy(stream.step(observation)))
        choice = Categorical(logits=out[:, :SIGNS])
        action = choice.sample()
        reward, ended = env.act(action.numpy())
        row = (
            observation,
            begins,
            action.numpy(),
            choice.log_prob(action).numpy(),
            out[:, SIGNS].numpy(),
            reward,
            ended,
        )
        for values, value in zip(columns.values(), row, strict=True):
            values.append(value)
    return Rollout(*(torch.from_numpy(np.stack(values)) for values in columns.values()), state=first)


def advantages(rollout: Rollout, gamma: float = 0.95, smoothing: float = 0.95) -> Tensor:
    """Estimate the advantages (T, N): generalised advantage estimation (Schulman et al., 2016, arXiv:1506.02438)."""
    result = torch.zeros_like(rollout.value)
    # The rollout ends here as if every episode did: a simplification, no value is estimated beyond its last step.
    advantage, next_value = torch.zeros(result.shape[1]), torch.zeros(result.shape[1])
    for t in reversed(range(len(result))):
        continues = (~rollout.ended[t]).float()
        error = rollout.reward[t] + gamma * next_value * continues - rollout.value[t]
        advantage = error + gamma * smoothing * continues * advantage
        result[t], next_value = advantage, rollout.value[t]
    return result


def loss_of(policy: Policy, rollout: Rollout, advantage: Tensor) -> Tensor:
    """Compute the clipped loss (Schulman et al., 2017, arXiv:1707.06347) over a whole rollout."""
    logits, value = policy(rollout.observation, rollout.begins, rollout.state)
    choice = Categorical(logits=logits)
    ratio = (choice.log_prob(rollout.action) - rollout.log_prob).exp()
    scaled = (advantage - advantage.mean()) / (advantage.std() + 1e-6)
    objective = torch.minimum(ratio * scaled, ratio.clamp(0.8, 1.2) * scaled).mean()
    error = (value - (advantage + rollout.value)).square().mean()
    return 0.5 * error - objective - 0.01 * choice.entropy().mean()


def difference_from_a_loop(policy: Policy, rollout: Rollout) -> float:
    """Return the largest difference of one call with resets from a loop over steps that resets rows by hand."""
    with torch.no_grad():
        outputs, _ = policy.memory(rollout.observation, rollout.state, resets=rollout.begins)
        h, worst = rollout.state, 0.0
        for t, observation in enumerate(rollout.observation):
            h = torch.where(rollout.begins[t, :, None], torch.zeros_like(h), h)
            h = policy.memory.cell(observation, h)
            worst = max(worst, (h - outputs[t]).abs().max().item())
    return worst


def train(updates: int, *, envs: int = 32, steps: int = 64, seed: int = 0, quiet: bool = False) -> float:
    """Train; return the share of right answers in the last rollout."""
    torch.manual_seed(seed)
    policy = Policy()
    fc.init.orthogonal_(policy.memory)
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    stream, env = fc.Stream(policy.memory, envs), Recall(envs, seed)
    right = 0.0
    for update in range(updates):
        rollout = collect(policy, stream, env, steps)
        if update == 0:
            difference = difference_from_a_loop(policy, rollout)
            assert difference < 1e-5, f"one call with resets and the loop over steps differ by {difference}"
            if not quiet:
                print(f"one call with resets differs from a loop over steps by {difference:.1e}")
        advantage = advantages(rollout)
        for _ in range(4):
            optimizer.zero_grad()
            loss_of(policy, rollout, advantage).backward()
            nn.utils.clip_grad_norm_(policy.parameters(), 0.5)
            optimizer.step()
        right = (rollout.reward.sum() / rollout.ended.sum()).item()
        if not quiet and update % 10 == 9:
            print(f"update {update + 1:4}  right answers {right:.2f}")
    return right


def main() -> None:
    """Train a policy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    train(options.updates, seed=options.seed)


if __name__ == "__main__":
    main()

"""Proximal policy optimisation with a memory: episodes end anywhere in a rollout, and training is still one call.

The task: the first observation of an episode shows one of four signs, then comes a delay of 2 to 9 steps of noise, then
the agent is asked. It is paid 1 for naming the sign. Without memory it is right one time in four.

Rollouts run a stream, a step in microseconds. Training runs all steps of all environments at once: ``resets`` puts a
row back to the initial state at each step that begins an episode. That this computes what a loop over steps computes
is checked at the first update.

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
FEATURES = SIGNS + 2  # the sign, whether it is asked for, noise


class Recall:
    """Many environments side by side; each starts its next episode by itself."""

    def __init__(self, count: int, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.sign = np.zeros(count, int)
        self.left = np.zeros(count, int)
        self.begin(np.arange(count))

    def begin(self, rows: np.ndarray) -> None:
        self.sign[rows] = self.random.integers(SIGNS, size=len(rows))
        self.left[rows] = self.random.integers(2, LONGEST + 1, size=len(rows))
        self.fresh = np.zeros(len(self.sign), bool)
        self.fresh[rows] = True

    def observe(self) -> np.ndarray:
        seen = np.zeros((len(self.sign), FEATURES), np.float32)
        seen[self.fresh, self.sign[self.fresh]] = 1
        seen[:, SIGNS] = self.left == 0
        seen[:, SIGNS + 1] = self.random.normal(size=len(self.sign))
        return seen

    def act(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rewards, and which episodes have ended."""
        ended = self.left == 0
        reward = (ended & (action == self.sign)).astype(np.float32)
        self.left -= 1
        self.begin(np.flatnonzero(ended))
        return reward, ended


class Policy(nn.Module):
    """A GRU, and on it the logits of the actions and the value."""

    def __init__(self, hidden: int = 32) -> None:
        super().__init__()
        self.memory = fc.Recurrent(fc.GRUCell(FEATURES, hidden))
        self.head = nn.Linear(hidden, SIGNS + 1)

    def forward(self, seen: Tensor, resets: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        y, _ = self.memory(seen, state, resets=resets)
        out: Tensor = self.head(y)
        return out[..., :SIGNS], out[..., SIGNS]


@dataclass
class Rollout:
    """(T, N) of everything; the state is that before the first step."""

    seen: Tensor
    begins: Tensor
    action: Tensor
    log_prob: Tensor
    value: Tensor
    reward: Tensor
    ended: Tensor
    state: Tensor


def collect(policy: Policy, stream: fc.Stream, env: Recall, steps: int) -> Rollout:
    """Run the policy for some steps; the stream and the environments go on where they were."""
    stream.refresh()  # the weights as they are now; the state stays
    found: dict[str, list[np.ndarray]] = {name: [] for name in Rollout.__annotations__ if name != "state"}
    first = torch.from_numpy(stream.state[0])
    for _ in range(steps):
        begins = env.fresh.copy()
        stream.reset(begins)
        seen = env.observe()
        with torch.no_grad():
            out = policy.head(torch.from_numpy(stream.step(seen)))
        choice = Categorical(logits=out[:, :SIGNS])
        action = choice.sample()
        reward, ended = env.act(action.numpy())
        now = (seen, begins, action.numpy(), choice.log_prob(action).numpy(), out[:, SIGNS].numpy(), reward, ended)
        for values, value in zip(found.values(), now, strict=True):
            values.append(value)
    return Rollout(*(torch.from_numpy(np.stack(values)) for values in found.values()), state=first)


def advantages(rollout: Rollout, gamma: float = 0.95, smoothing: float = 0.95) -> Tensor:
    """Generalised advantage estimation (Schulman et al., 2016, arXiv:1506.02438)."""
    found = torch.zeros_like(rollout.value)
    following, ahead = torch.zeros(found.shape[1]), torch.zeros(found.shape[1])
    for t in reversed(range(len(found))):
        goes_on = (~rollout.ended[t]).float()
        surprise = rollout.reward[t] + gamma * ahead * goes_on - rollout.value[t]
        following = surprise + gamma * smoothing * goes_on * following
        found[t], ahead = following, rollout.value[t]
    return found


def loss_of(policy: Policy, rollout: Rollout, gain: Tensor) -> Tensor:
    """The clipped objective (Schulman et al., 2017, arXiv:1707.06347) over a whole rollout."""
    logits, value = policy(rollout.seen, rollout.begins, rollout.state)
    choice = Categorical(logits=logits)
    ratio = (choice.log_prob(rollout.action) - rollout.log_prob).exp()
    scaled = (gain - gain.mean()) / (gain.std() + 1e-6)
    objective = torch.minimum(ratio * scaled, ratio.clamp(0.8, 1.2) * scaled).mean()
    error = (value - (gain + rollout.value)).square().mean()
    return 0.5 * error - objective - 0.01 * choice.entropy().mean()


def difference_from_a_loop(policy: Policy, rollout: Rollout) -> float:
    """How far one call with resets is from a loop over steps that puts rows back by hand."""
    with torch.no_grad():
        found, _ = policy.memory(rollout.seen, rollout.state, resets=rollout.begins)
        h, worst = rollout.state, 0.0
        for t, seen in enumerate(rollout.seen):
            h = torch.where(rollout.begins[t, :, None], torch.zeros_like(h), h)
            h = policy.memory.cell(seen, h)
            worst = max(worst, (h - found[t]).abs().max().item())
    return worst


def train(updates: int, *, envs: int = 32, steps: int = 64, seed: int = 0, quiet: bool = False) -> float:
    """Train, and return the share of right answers in the last rollout."""
    torch.manual_seed(seed)
    policy = Policy()
    fc.init.orthogonal_(policy.memory)
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    stream, env = fc.Stream(policy.memory, envs), Recall(envs, seed)
    right = 0.0
    for update in range(updates):
        rollout = collect(policy, stream, env, steps)
        if update == 0:
            apart = difference_from_a_loop(policy, rollout)
            assert apart < 1e-5, f"one call with resets and the loop over steps are {apart} apart"
            if not quiet:
                print(f"one call with resets against a loop over steps: {apart:.1e} apart")
        gain = advantages(rollout)
        for _ in range(4):
            optimizer.zero_grad()
            loss_of(policy, rollout, gain).backward()
            nn.utils.clip_grad_norm_(policy.parameters(), 0.5)
            optimizer.step()
        right = (rollout.reward.sum() / rollout.ended.sum()).item()
        if not quiet and update % 10 == 9:
            print(f"update {update + 1:4}  right answers {right:.2f}")
    return right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    train(given.updates, seed=given.seed)


if __name__ == "__main__":
    main()
